"""`quadriga checkpoints`: list the checkpoints of a run, and verify them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import messages, titan
from quadriga.checkpoint.files import files_at, join
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.cli.arguments import Parser
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, EXIT_OK, Problem, UserError, printable
from quadriga.units import format_bytes, format_count

ABOUT = (
    "List the checkpoints of a run: step, contents, size, and the number of ranks that saved them. "
    "The exit code is 3 if checkpoints exist and none of them is good."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("checkpoints", ABOUT)
    parser.add_argument("folder", help="a run folder, its checkpoint folder, or a URL")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its hash")
    chosen = parser.parse_args(argv)
    folder = checkpoint_folder_of(chosen.folder)
    nowhere = any(os.path.islink(one) and not os.path.isdir(one) for one in (chosen.folder, folder))
    if nowhere or not files_at(folder).exists(folder):
        raise UserError(Problem("FOLDER", "there is no such folder", folder))
    if "://" not in folder and not os.path.isdir(folder):
        raise UserError(Problem("FOLDER", "is not a folder", folder))
    whole, damaged = folders.list_checkpoints(folder)
    candidates, damaged = titan.find_candidates(folder, damaged)
    titan_checkpoints, rejected = split_titan(candidates)
    damaged += rejected
    good = len(titan_checkpoints)
    for found in whole:
        wrong = folders.find_damage(found) if chosen.verify else []
        good += not wrong
        print(printable(format_checkpoint(found, "verified" if chosen.verify else "sizes are correct")))
        for reason in wrong:
            print(printable(f"  DAMAGED: {reason}"))
    for found in titan_checkpoints:
        print(
            printable(f"{found.path}: {', '.join(found.contents)}; saved by {found.trainer}, without hashes to verify")
        )
    for _, reason in damaged:
        print(printable(f"DAMAGED: {reason}"))
    for reason in folders.non_folders_in(folder):
        print(printable(reason))
    for name in folders.foreign_steps_in(folder):
        print(printable(f"{name}: saved by another trainer; only readable from a disk, not from an object store"))
    for name in folders.unpublished_in(folder):
        print(printable(f"{name}: not completed; the next start removes it"))
    if not whole and not damaged and not titan_checkpoints:
        print(printable(f"{folder}: no checkpoint"))
        return EXIT_OK
    return EXIT_OK if good else EXIT_NO_GOOD_CHECKPOINT


def split_titan(candidates: Sequence[CheckpointInfo]) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
    """The checkpoints of torchtitan, and (step, reason) of the other candidates."""
    titan_checkpoints, rejected = [], []
    for one in candidates:
        try:
            if (found := titan.inspect(one.path)) is not None:
                titan_checkpoints.append(found)
            else:
                rejected.append((one.step, messages.no_manifest(one.path)))
        except folders.InvalidCheckpoint as reason:
            rejected.append((one.step, str(reason)))
    return titan_checkpoints, rejected


def checkpoint_folder_of(folder: str) -> str:
    """`checkpoint/` inside the folder if it exists, else the folder itself."""
    inside = join(folder, "checkpoint")
    return inside if files_at(folder).exists(inside) else folder


def format_checkpoint(found: CheckpointInfo, state: str) -> str:
    parts = [f"{found.path}: {', '.join(found.contents)}", format_bytes(folders.checkpoint_bytes(found)), state]
    state_of_run, ranks = found.extra.get("train_state"), found.extra.get("world_size")
    tokens = state_of_run.get("tokens_seen") if isinstance(state_of_run, dict) else None
    if type(tokens) is int:
        parts.append(f"{format_count(tokens)} tokens seen")
    if type(ranks) is int:
        parts.append(f"saved on {ranks} ranks")
    return "; ".join(parts)
