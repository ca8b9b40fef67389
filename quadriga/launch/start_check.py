"""Whether a run would start, and from where: one check for the dry run and for the start itself.

It uses no torch and writes nothing. The ranks check the rest: the content of large checkpoints, of weights and of data.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

from quadriga.checkpoint import folder as checkpoints
from quadriga.checkpoint import messages, titan
from quadriga.checkpoint.files import is_url
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.hf_headers import HEAD, HfHeaders, refuse_other_names
from quadriga.config import Run
from quadriga.config.continuity import check_extra, data_order_problems, model_problems, resume_problems, shape_problems
from quadriga.config.schema import Checkpoint
from quadriga.errors import Problem, UserError
from quadriga.limits import DRY_RUN_HASHED_BYTES, PATH, PATH_PART
from quadriga.models import registry
from quadriga.resilience.processes import LOCK_NAME, in_use
from quadriga.units import format_bytes

FINISHED = "nowhere: this run is finished"
FILES_BELOW = 512  # bytes of the paths that a run makes within a folder
FROM_SCRATCH = "step 0, from initial weights"


def find_start(run: Run, *, deep: bool) -> str:
    """One line that says what the run would start from.

    Args:
        deep: also verify the hashes of small checkpoints, and whether another run holds the folder. A dry run does
            this; in a start, the ranks do.

    Raises:
        UserError: the run would not start, with the reasons.
        CheckpointError: checkpoints exist and none is good, or one is invalid although its hashes are right; with exit
            code 3.
    """
    section, spec = run.config.checkpoint, run.spec
    problems = _no_tokenizer(run) + _not_writable("job.dump_folder", spec.folders.dump)
    if not problems:
        problems = _not_writable("comm.save_traces_folder", spec.folders.comm_traces)
    if deep and not problems:
        problems = _locked_by_another_run(spec.folders.dump)
    try:
        if not section.enable:
            start = FROM_SCRATCH
        else:
            start = _from_checkpoints(run, deep)
            if not section.load_only and not is_url(spec.folders.checkpoint):
                problems += _not_writable("checkpoint.folder", spec.folders.checkpoint)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if deep and not problems and not start.startswith(FINISHED):  # a finished run ends before it opens its data
        from quadriga.data.data_check import data_problems

        problems = data_problems(run.config.training, run.config.validation, spec)
    if problems:
        raise UserError(*problems)
    return start


def _no_tokenizer(run: Run) -> list[Problem]:
    """Why the tokenizer cannot be used, as each rank would report it. A missing one is reported elsewhere."""
    if run.spec.tokenizer.kind not in ("huggingface", "tiktoken"):
        return []
    from quadriga.data.tokenizer import build_tokenizer

    try:
        build_tokenizer(run.spec.tokenizer.path)
    except UserError as error:
        return list(error.problems)
    return []


def _from_checkpoints(run: Run, deep: bool) -> str:
    section, folder = run.config.checkpoint, run.spec.folders.checkpoint
    seed = section.create_seed_checkpoint  # such a run loads nothing, so damaged checkpoints do not matter
    found = checkpoints.find_complete(folder, section.load_step) if seed else _newest_checkpoint(section, folder, deep)
    counts = "train_state" not in section.exclude_from_loading
    if found is not None and counts and found.step >= run.spec.steps:
        return f"{FINISHED} ({found.path} is step {found.step} of {run.spec.steps})"
    if seed:
        return FROM_SCRATCH
    if found is not None and not found.resume:  # a seed checkpoint of torchtitan
        _check_resumable(found, run, deep)
        return f"step 0, from the weights of {found.path}, which torchtitan saved"
    if found is not None:
        _check_resumable(found, run, deep)
        return _resumes(found, run, deep)
    if section.initial_load_in_hf:
        place = section.initial_load_path or run.config.model.hf_assets_path
        _hf_weights(place, run)
        return f"step 0, from the Hugging Face weights in {place}"
    if section.initial_load_path is None:
        return FROM_SCRATCH
    found = _initial_checkpoint(section.initial_load_path, deep)
    if deep and (found is None or (section.initial_load_model_only and not found.trainer)):
        _refuse_other_weights(found.location if found else section.initial_load_path, run, foreign=found is None)
    if found is None:
        return f"step 0, from the weights of {section.initial_load_path}, which were not saved by Quadriga"
    if section.initial_load_model_only:
        if not section.allow_change and (unlike := model_problems(found.extra, run)):
            raise UserError(*unlike)
        _check_titan_checkpoint(replace(found, resume=False), section, run)
        return f"step 0, from the weights of {found.path}{_unverified(found, deep)}"
    if (found.resume or found.trainer) and found.contents == ("model",):  # also with `exclude_from_loading`
        raise UserError(messages.missing_contents(found, ["optimizer"]))
    _check_resumable(found, run, deep)
    return _resumes(found, run, deep)


def _resumes(found: CheckpointInfo, run: Run, deep: bool) -> str:
    start = f"step {found.step}, from {found.path}{_unverified(found, deep)}{_lost_data_position(found, run)}"
    if "train_state" not in run.config.checkpoint.exclude_from_loading:
        return start
    why = f"checkpoint.exclude_from_loading has train_state; saves replace equal steps in {run.spec.folders.checkpoint}"
    return f"step 0, with the rest of {start}. {why}"


def _newest_checkpoint(section: Checkpoint, folder: str, deep: bool) -> CheckpointInfo | None:
    """The newest good checkpoint of the run, or that of `load_step`, as `checkpoint.search` chooses it."""
    whole, damaged = titan.list_all(folder)
    refused, asked = dict(damaged), section.load_step
    if asked >= 0 and asked not in {found.step for found in whole} | refused.keys():
        raise UserError(messages.no_such_step(asked, folder, whole))
    for found in reversed(whole):
        if asked not in (-1, found.step):
            continue
        if found.trainer:
            inspected, refused[found.step] = titan.inspect_candidate(found.path)
            if inspected is not None:
                return inspected
            continue
        if not (wrong := _damage(found, deep)):
            return found
        refused[found.step] = "; ".join(wrong)
    if asked >= 0 or refused:
        raise messages.no_valid_checkpoint(folder, asked, refused)
    return None


def _initial_checkpoint(path: str, deep: bool) -> CheckpointInfo | None:
    """The checkpoint at `initial_load_path`. None: a folder of another program, which DCP reads."""
    found = titan.find_initial(path)
    if found is None:
        return None
    if wrong := _damage(found, deep):
        refused = {found.step: "; ".join(wrong)}
        raise messages.no_valid_checkpoint(path, found.step, refused)
    return found


def _damage(found: CheckpointInfo, deep: bool) -> list[str]:
    small = deep and not is_url(found.location) and checkpoints.checkpoint_bytes(found) <= DRY_RUN_HASHED_BYTES
    return checkpoints.find_damage(found) if small else []


def _unverified(found: CheckpointInfo, deep: bool) -> str:
    if found.trainer:
        return f", which {found.trainer} saved"
    size = checkpoints.checkpoint_bytes(found)
    return f" (its {format_bytes(size)} are verified at the start)" if deep and size > DRY_RUN_HASHED_BYTES else ""


def _lost_data_position(found: CheckpointInfo, run: Run) -> str:
    """A remark that a run of torchtitan reads its data from the start, if its position in them is not known."""
    if not found.trainer or "dataloader" in run.config.checkpoint.exclude_from_loading:
        return ""
    training = run.config.training
    why = messages.unknown_position(
        found.extra["dataloader"], shuffle=training.dataloader.shuffle, foreign=training.foreign_to_torchtitan
    )
    return f"; {messages.position_lost(why)}" if why else ""


def _check_resumable(found: CheckpointInfo, run: Run, deep: bool) -> None:
    """Refuse a checkpoint from which this run cannot resume. `deep`: also compare the data with the checkpoint's."""
    section = run.config.checkpoint
    if found.trainer:
        _check_titan_checkpoint(found, section, run)
        return
    required = {"model", "optimizer"} - set(section.exclude_from_loading)
    if absent := sorted(required - set(found.contents)):
        raise UserError(messages.missing_contents(found, absent))
    kept = {part: value for part, value in found.extra.items() if part not in section.exclude_from_loading}
    with messages.convert_extra_errors(found):
        check_extra(kept, found.step)
        changed = shape_problems(kept, run) if section.allow_change else resume_problems(kept, run)
        if "dataloader" in kept and not section.allow_change:
            changed += data_order_problems(kept, run)
            if deep:
                from quadriga.data.data_check import changed_data

                changed += changed_data(kept["dataloader"], run.config.training, run.spec)
    if changed:
        raise UserError(*changed)


def _refuse_other_weights(path: str, run: Run, foreign: bool) -> None:
    """Refuse weights of another model, as `load_tensors` does. `foreign`: there may be more than the weights."""
    there, wanted = titan.shapes_in(path, checked=not foreign), registry.tensor_names(run.spec.model).shapes
    if not foreign or any(name.startswith(titan.MODEL) for name in there):
        wanted = {titan.MODEL + name: shape for name, shape in wanted.items()}
    missing, surplus, reshaped = messages.compare_shapes(wanted, there, "checkpoint", "run")
    surplus = [] if foreign else [name for name in surplus if name.startswith(titan.MODEL)]
    if problems := messages.other_tensors(path, missing, surplus, reshaped):
        raise UserError(*problems)


def _check_titan_checkpoint(found: CheckpointInfo, section: Checkpoint, run: Run) -> None:
    """Refuse a checkpoint of torchtitan that is of another model, or lacks moments that would be loaded."""
    if not found.trainer:
        return
    if messages.is_last_save(found):  # also with `exclude_from_loading`
        raise UserError(messages.no_training_state(found))
    parts = {"model", "optimizer"} if found.resume else {"model"}
    required = parts - set(section.exclude_from_loading)
    if absent := sorted(required - set(found.contents)):
        raise UserError(messages.missing_contents(found, absent))
    moments = titan.MOMENTS if "optimizer" in required else ()
    titan.refuse_other_titan_model(
        found.path, titan.shapes_in(found.path), registry.tensor_names(run.spec.model), required, moments
    )


def _hf_weights(place: str, run: Run) -> None:
    """Refuse a folder without weights, or with weights of another model, as a start does. Only headers are read."""
    names, source = registry.tensor_names(run.spec.model), HfHeaders(place)
    hf_config = source.raw_config()
    unlike = names.config_differences(hf_config, source.config_file)
    if unlike and not run.config.checkpoint.allow_change:
        raise UserError(*unlike)
    if hf_config.get("tie_word_embeddings") is True and run.spec.model.tie_embeddings:
        source.files.pop(HEAD, None)  # a start compares it with the embedding
    refuse_other_names(source, names, names.shapes)


def _not_writable(key: str, folder: str) -> list[Problem]:
    """Why nothing could be written in `folder`, which may not exist yet."""
    fix = f"choose a folder that you may write with --{key}"
    if max(map(len, map(os.fsencode, folder.split("/")))) > PATH_PART:
        return [Problem(key, f"cannot be written: a name of more than {PATH_PART} bytes", folder, fix=fix)]
    there = Path(folder).absolute()
    if len(os.fsencode(there)) > PATH - FILES_BELOW:
        return [Problem(key, f"cannot be written: its path has more than {PATH - FILES_BELOW} bytes", folder, fix=fix)]
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        return [Problem(key, f"cannot be written: {there} is not a folder", folder, fix=fix)]
    if not os.access(there, os.W_OK | os.X_OK):
        return [Problem(key, f"cannot be written: no permission to write in {there}", folder, fix=fix)]
    return []


def _locked_by_another_run(folder: str) -> list[Problem]:
    """A problem if another run holds the lock of the folder now, or if a start could not open it."""
    path, fix = os.path.join(folder, LOCK_NAME), "choose a folder that you may write with --job.dump_folder"
    if not os.path.lexists(path):
        return []
    if os.path.islink(path) or not os.path.isfile(path):
        return [Problem("job.dump_folder", f"its {LOCK_NAME} is not a regular file", folder, fix=fix)]
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:
        return [Problem("job.dump_folder", f"cannot be written: {error.strerror}", folder, fix=fix)]
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return [in_use(handle, folder)]
    except OSError:
        return []
    finally:
        os.close(handle)
    return []
