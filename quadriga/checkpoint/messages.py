"""Messages about checkpoints: what happened, what is safe, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.files import files_at, is_url, join, local
from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo
from quadriga.checkpoint.manifest import METADATA, STATE_FILE
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, Problem, UserError, shortened
from quadriga.log import logger
from quadriga.units import format_bytes, format_some

NEW_RUN = "another job.dump_folder, and this folder as checkpoint.initial_load_path"
TO_RESUME = "start from another checkpoint (--checkpoint.load_step), or from only its weights in a new run folder"


def save_failed(folder: str, step: int, error: Exception) -> str:
    whole: list[str] = []
    with suppress(OSError, UserError):
        whole = [f"step-{found.step}" for found in folders.whole_in(folder)]
    lines = [f"step {step} was not saved: {error}", f"complete in {folder}: {', '.join(whole) or 'none'}"]
    if not is_url(folder):
        with suppress(OSError):
            path = local(folder).absolute()
            location = next(one for one in (path, *path.parents) if one.exists())
            lines.append(f"free space there: {format_bytes(shutil.disk_usage(location).free)}")
    lines.append("free some space or repair the folder; the next start resumes from the newest complete one")
    return "\n".join(lines)


def cannot_be_written(folder: str, error: OSError) -> Problem:
    fix = "choose another with --checkpoint.folder or --job.dump_folder, or save nothing: --checkpoint.load_only"
    return Problem("checkpoint.folder", f"cannot be written: {error.strerror or error}", folder, fix=fix)


def not_a_folder(folder: str) -> Problem:
    what = "is not a folder: it is a file, or a link whose target is missing"
    fix = "mount the disk or repair the link; or remove it, if there is nothing to resume from"
    return Problem("checkpoint.folder", what, folder, fix=fix)


def no_valid_checkpoint(folder: str, asked: int, refused: Mapping[int, str]) -> CheckpointError:
    what = f"step {asked}, which was requested, is damaged" if asked >= 0 else "no published checkpoint is good"
    lines = [f"{folder}: {what}", *(reason for step, reason in sorted(refused.items()) if asked in (-1, step))]
    lines.append("nothing was changed, and the run does not start from scratch")
    if asked >= 0:
        lines.append("to resume from the newest good one, start without checkpoint.load_step")
    else:
        lines.append("restore these files from a copy; or start anew: use another job.dump_folder, or remove this one")
    return CheckpointError("\n".join(lines), EXIT_NO_GOOD_CHECKPOINT)


def refusal_error(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: {error}\n"
        "no code in this checkpoint was executed, and no tensor was loaded from it\n"
        "use another checkpoint of the run (checkpoint.load_step), or a copy from a source that you trust",
        EXIT_NO_GOOD_CHECKPOINT,
    )


def log_generator_changes(unfilled: Sequence[str], unused: Sequence[str]) -> None:
    """Logs random generators that only the checkpoint or only the run has, after a move to or from CUDA."""
    for what, names in (
        ("that are not in the checkpoint start anew", unfilled),
        ("of the checkpoint that this run does not use", unused),
    ):
        if names:
            logger.info(f"random generators {what}: {', '.join(name.rpartition('.')[2] for name in names)}")


def only_remains(folder: str, remains: Iterable[str]) -> str:
    return f"{folder}: only files of unfinished saves ({', '.join(remains)}), no checkpoint: THIS RUN STARTS AT STEP 0"


def no_such_step(step: int, folder: str, whole: list[CheckpointInfo]) -> Problem:
    allowed = ", ".join(str(found.step) for found in whole) or "there is none: leave it at -1"
    return Problem("checkpoint.load_step", f"{folder} has no checkpoint of this step", str(step), allowed=allowed)


def missing_contents(found: CheckpointInfo, absent: list[str]) -> Problem:
    if found.trainer:
        return no_training_state(found)
    what = f"has {' and '.join(found.contents)}, but no {' and '.join(absent)}: a run cannot resume from it"
    return Problem(found.path, what, fix=f"start a new run from it: {NEW_RUN}")


def no_manifest(path: str) -> str:
    return f"{path} has no train_state.json, and its tensors do not have torchtitan's names"


def no_state(path: str, hugging_face: bool) -> str:
    """For a step that another trainer saved without a plan of torch.distributed.checkpoint."""
    if not hugging_face:
        return f"{path} has an unfinished save of another trainer, and no checkpoint of Quadriga"
    return (
        f"{path} has weights in Hugging Face's format. No run can resume from them: start a new run from them (another "
        "job.dump_folder, this folder as checkpoint.initial_load_path, and checkpoint.initial_load_in_hf)"
    )


def not_read_from_stores(folder: str, names: list[str]) -> str:
    return (
        f"{folder}: saved by another trainer, skipped and kept: {', '.join(names)}. To resume from such a step, "
        "copy the folder to a disk: checkpoints of torchtitan are read only from a disk"
    )


def is_last_save(found: CheckpointInfo) -> bool:
    """Whether it is torchtitan's last save: weights of a step above 0, and nothing else."""
    return bool(found.trainer) and found.resume and found.contents == ("model",)


def no_training_state(found: CheckpointInfo) -> Problem:
    """For a last save of torchtitan."""
    why = "it has only the weights (its checkpoint.last_save_model_only), so no run can resume from it"
    fix = "resume from an earlier step of that run (checkpoint.load_step); or start a new run from these weights"
    return Problem(found.path, f"torchtitan's last save: {why}", fix=f"{fix}: {NEW_RUN}")


def titan_not_verified(found: CheckpointInfo) -> str:
    held = "weights and optimizer" if "optimizer" in found.contents else "only the weights, like its last save"
    return (
        f"{found.path} was saved by torchtitan and has {held}. It has no hashes, so it is not verified. Rows of query "
        "and key matrices are reordered for the rotation of halves"
    )


def unknown_position(loader: Mapping[str, Any], *, shuffle: bool, foreign: str | None) -> str | None:
    """Why this run cannot continue at the position of torchtitan's data loader; None if it can, as far as its
    checkpoint shows (`loader`: from `titan.inspect`). `foreign`: what this run reads, if torchtitan does not read that.
    Other data are detected when they are opened."""
    if (unknown := loader.get("unknown")) is not None:
        return str(unknown)
    if foreign is not None:
        return f"the training data are {foreign}, in which torchtitan has no position"
    if not shuffle:
        return None
    return (
        "it is a position in unshuffled data, and training.dataloader.shuffle is true here (to continue there: "
        "training.dataloader.shuffle = false and training.dataloader.window_overlap = 0)"
    )


def position_lost(why: str) -> str:
    return f"the position in the data is not restored: {why}. Reading begins at the start of the data"


def not_a_checkpoint(path: str, reason: Exception) -> Problem:
    what, fix = f"not a checkpoint: {reason}", None
    with suppress(OSError, UserError):  # of a disk or server that does not answer: `reason` reports it
        what, fix = _describe_contents(path, what)
    if not is_url(path) and any(Path(path).glob("*.safetensors")):
        fix = "for Hugging Face weights add --checkpoint.initial_load_in_hf"
    allowed = "a folder `step-N` of a run, the folder that has them, or one of torch.distributed.checkpoint"
    return Problem("checkpoint.initial_load_path", what, path, allowed=allowed, fix=fix)


def _describe_contents(path: str, damage: str) -> tuple[str, str | None]:
    """The problem of a place that is not a complete checkpoint, and the remedy. `damage`: if it has its files."""
    files = files_at(path)
    if not files.exists(path) and not files.names(path):
        return "not a checkpoint: it does not exist", "correct the path; relative ones start at the current directory"
    names = files.names(path) if is_url(path) or Path(path).is_dir() else []
    if STATE_FILE in names or METADATA in names:
        return damage, None
    if torn := folders.damaged_in(path):
        return f"it has no complete checkpoint: {'; '.join(torn)}", None
    inside = join(path, "checkpoint")
    if any(folders.PUBLISHED.fullmatch(name) for name in files.names(inside)):
        fix: str | None = f"its checkpoints are in {inside}: use that folder, or a step-N in it"
    else:
        fix = "use a folder that has one; for Hugging Face weights also set checkpoint.initial_load_in_hf"
    return f"it has no checkpoint (neither {STATE_FILE} nor {METADATA})", fix


def mismatches(where: str, kinds: Iterable[tuple[str, Sequence[str]]], fix: str) -> list[Problem]:
    """One problem per kind of mismatch that exists. `kinds`: (description, names)."""
    return [Problem(where, f"{kind} {format_some(names)}", fix=fix) for kind, names in kinds if names]


def other_tensors(where: str, missing: list[str], surplus: list[str], reshaped: list[str]) -> list[Problem]:
    kinds = (
        ("the checkpoint lacks", missing),
        ("only the checkpoint has", surplus),
        ("shapes differ:", reshaped),
    )
    return mismatches(where, kinds, "start with the configuration that saved it, or with another job.dump_folder")


def compare_shapes(
    wanted: Mapping[str, Sequence[int]], there: Mapping[str, Sequence[int]], place: str, here: str = "model"
) -> tuple[list[str], list[str], list[str]]:
    """The names that only `wanted` has, the names that only `there` has, and both shapes of those that differ."""
    reshaped = [
        f"{name}: {list(shape)} in the {place}, {list(wanted[name])} in the {here}"
        for name, shape in there.items()
        if name in wanted and tuple(wanted[name]) != tuple(shape)
    ]
    return sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys()), reshaped


def not_verified(path: str) -> str:
    return (
        f"{path} was not saved by Quadriga: it has no hashes, so it is not verified. Its weights are loaded by name; "
        "rows of query and key matrices must be in the order for rotated halves (docs/hugging-face.md)"
    )


@contextmanager
def convert_extra_errors(found: CheckpointInfo, fix: str = TO_RESUME) -> Iterator[None]:
    """Converts errors of the body, which uses `found.extra`, to a UserError that names the manifest."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"the state of the run in it cannot be used ({type(error).__name__}: {shortened(error, 200)})"
        raise UserError(Problem(join(found.path, STATE_FILE), what, fix=fix)) from error
