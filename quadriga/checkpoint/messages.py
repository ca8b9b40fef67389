"""What users are told of checkpoints: what happened, what is safe, what to do next."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.files import files_at, is_url, local
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.manifest import METADATA, STATE_FILE
from quadriga.errors import Problem, UserError
from quadriga.log import logger
from quadriga.units import format_bytes, format_some


def save_failed(folder: str, step: int, error: Exception) -> str:
    whole: list[str] = []
    with suppress(OSError, UserError):
        whole = [f"step-{found.step}" for found in folders.whole_in(folder)]
    lines = [f"step {step} was not saved: {error}", f"whole in {folder}: {', '.join(whole) or 'none'}"]
    if not is_url(folder):
        with suppress(OSError):
            path = local(folder).absolute()
            location = next(one for one in (path, *path.parents) if one.exists())
            lines.append(f"room left there: {format_bytes(shutil.disk_usage(location).free)}")
    lines.append("make room or mend the folder; a start goes on from the newest whole one")
    return "\n".join(lines)


def cannot_be_written(folder: str, error: OSError) -> Problem:
    return Problem(
        where="checkpoint.folder",
        value=folder,
        what=f"cannot be written: {error.strerror or error}",
        fix="choose another with --checkpoint.folder or --job.dump_folder, or save nothing: --checkpoint.load_only",
    )


def not_a_folder(folder: str) -> Problem:
    return Problem(
        where="checkpoint.folder",
        value=folder,
        what="is no folder: a file, or a link that leads nowhere",
        fix="mount the disk or mend the link; or remove it, if there is nothing to go on from",
    )


def no_valid_checkpoint(folder: str, asked: int, refused: Mapping[int, str]) -> str:
    what = f"step {asked}, which was asked for, is damaged" if asked >= 0 else "no published checkpoint is good"
    lines = [f"{folder}: {what}", *(reason for step, reason in sorted(refused.items()) if asked in (-1, step))]
    lines.append("nothing was changed, and nothing is started from scratch unasked")
    if asked >= 0:
        lines.append("to go on from the newest good one, start without checkpoint.load_step")
    else:
        lines.append("restore these files from a copy; or begin anew: another job.dump_folder, or this folder removed")
    return "\n".join(lines)


def log_generator_changes(unfilled: Sequence[str], unused: Sequence[str]) -> None:
    """Of random generators that only one side has: a run moved between machines with and without CUDA."""
    if unfilled:
        names = ", ".join(name.rpartition(".")[2] for name in unfilled)
        logger.info(f"random generators that the checkpoint lacks begin anew: {names}")
    if unused:
        names = ", ".join(name.rpartition(".")[2] for name in unused)
        logger.info(f"random generators of the checkpoint that this run has no use for: {names}")


def only_remains(folder: str, remains: Iterable[str]) -> str:
    return (
        f"{folder}: only remains of saves that never ended ({', '.join(remains)}), no checkpoint: "
        "THIS RUN STARTS AT STEP 0"
    )


def no_such_step(step: int, folder: str, whole: list[CheckpointInfo]) -> Problem:
    return Problem(
        where="checkpoint.load_step",
        value=str(step),
        what=f"{folder} has no checkpoint of this step",
        allowed=", ".join(str(found.step) for found in whole) or "none is there: leave it at -1",
    )


def missing_contents(found: CheckpointInfo, absent: list[str]) -> Problem:
    if found.trainer:
        return no_training_state(found)
    return Problem(
        where=found.path,
        what=f"holds {' and '.join(found.contents)}, but no {' and '.join(absent)}: a run cannot go on from it",
        fix="start a new run from it: another job.dump_folder, and this folder as checkpoint.initial_load_path",
    )


def no_manifest(path: str) -> str:
    return f"{path} has no train_state.json, and its tensors have not torchtitan's names"


def no_state(path: str, hugging_face: bool) -> str:
    """Of a step that another trainer saved without a plan of torch.distributed.checkpoint."""
    if not hugging_face:
        return f"{path} holds no checkpoint of ours, and of another trainer's a part alone: its save never ended"
    return (
        f"{path} holds weights in Hugging Face's form, from which no run can go on: start a new run from them (another "
        "job.dump_folder, this folder as checkpoint.initial_load_path, and checkpoint.initial_load_in_hf)"
    )


def not_read_from_stores(folder: str, names: list[str]) -> str:
    return (
        f"{folder}: saved by another trainer, passed over and kept: {', '.join(names)}. To go on from such a step, "
        "copy the folder to a disk: checkpoints of torchtitan are read from there alone"
    )


def is_last_save(found: CheckpointInfo) -> bool:
    """Whether it is torchtitan's last save: weights of a step above 0, and nothing else."""
    return bool(found.trainer) and found.resume and found.contents == ("model",)


def no_training_state(found: CheckpointInfo) -> Problem:
    """Of a last save of torchtitan."""
    return Problem(
        where=found.path,
        what="torchtitan's last save: it holds the weights alone (its checkpoint.last_save_model_only), so no run can "
        "go on from it",
        fix="go on from an earlier step of that run (checkpoint.load_step); or start a new run from these weights: "
        "another job.dump_folder, and this folder as checkpoint.initial_load_path",
    )


def titan_not_verified(found: CheckpointInfo) -> str:
    held = "weights and optimizer" if "optimizer" in found.contents else "the weights alone, as its last save does"
    return (
        f"{found.path} was saved by torchtitan and holds {held}. It has no hashes to verify it by. Rows of query and "
        "key matrices are put in the order of rotated halves"
    )


def unknown_position(loader: Mapping[str, Any], shuffle: bool) -> str | None:
    """Why this run cannot read on where torchtitan's data loader stood; None where it can, as far as its checkpoint
    says (`loader`: what `titan.inspect` found of the loader). Other data are met when they are opened."""
    if (unknown := loader.get("unknown")) is not None:
        return str(unknown)
    if not shuffle:
        return None
    return (
        "it is one in the data's own order, and training.dataloader.shuffle is true here (to go on at its place: "
        "training.dataloader.shuffle = false and training.dataloader.window_overlap = 0)"
    )


def position_lost(why: str) -> str:
    return f"the place in the data is not taken over: {why}. Reading begins at the start of the data"


def not_a_checkpoint(path: str, reason: Exception) -> Problem:
    what, fix = f"no checkpoint: {reason}", None
    with suppress(OSError, UserError):  # of a disk or server that does not answer: the reason tells of it
        what, fix = _describe_contents(path, what)
    if _has_safetensors(path):
        fix = "for Hugging Face weights add --checkpoint.initial_load_in_hf"
    return Problem(
        where="checkpoint.initial_load_path",
        value=path,
        what=what,
        allowed="a folder `step-N` of a run, the folder that holds them, or one of torch.distributed.checkpoint",
        fix=fix,
    )


def _describe_contents(path: str, damage: str) -> tuple[str, str | None]:
    """What to say of a place that is no whole checkpoint, and what to do; `damage`: of one that has its files."""
    files = files_at(path)
    if not files.exists(path) and not files.names(path):
        return "no checkpoint: nothing is there", "correct the path; relative ones are looked for from the start folder"
    names = files.names(path) if is_url(path) or Path(path).is_dir() else []
    if STATE_FILE in names or METADATA in names:
        return damage, None
    if torn := folders.damaged_in(path):
        return f"no whole checkpoint is there: {'; '.join(torn)}", None
    inside = folders.join(path, "checkpoint")
    if any(folders.PUBLISHED.fullmatch(name) for name in files.names(inside)):
        fix: str | None = f"its checkpoints lie in {inside}: name that folder, or a step-N in it"
    else:
        fix = "name a folder that holds one; for Hugging Face weights set checkpoint.initial_load_in_hf too"
    return f"no checkpoint is there (neither {STATE_FILE} nor {METADATA})", fix


def mismatches(where: str, kinds: Iterable[tuple[str, Sequence[str]]], fix: str) -> list[Problem]:
    """A problem for each kind of what does not fit, of which there is any: (the kind in words, the names)."""
    return [Problem(where, f"{kind} {format_some(names)}", fix=fix) for kind, names in kinds if names]


def not_verified(path: str) -> str:
    return (
        f"{path} was not saved by Quadriga: it has no hashes to verify it by. Its weights are taken by their names; "
        "query and key matrices are expected in the order of rotated halves (docs/hugging-face.md)"
    )


def _has_safetensors(path: str) -> bool:
    return not is_url(path) and any(Path(path).glob("*.safetensors"))
