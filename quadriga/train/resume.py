"""What a checkpoint saves of a run, and how a run is restored from it, from one of torchtitan, or from Hugging Face
weights. A resume that would continue another training is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.manager import CheckpointManager, Stateful
from quadriga.checkpoint.messages import convert_extra_errors, position_lost, unknown_position
from quadriga.comm import collectives, process_group
from quadriga.config import Run
from quadriga.config.continuity import check_extra, model_problems, resume_problems, run_facts, shape_problems
from quadriga.config.legacy_keys import started_with
from quadriga.config.schema import JobConfig
from quadriga.data.loader import Loader
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.models import registry
from quadriga.optim.schedule import fast_forward
from quadriga.train.run_files import versions
from quadriga.train.state import TrainState
from quadriga.units import format_seconds, plural

Change = tuple[str, Any, Any]  # the key, what it was, what it is
PATH_KEYS = {"job.config_file", "job.dump_folder"}  # other paths do not change the run


def resume(run: Run, state: TrainState, checkpoints: CheckpointManager) -> None:
    """Restore the state from the newest good checkpoint; without one, load Hugging Face weights if requested."""
    state.progress.enter_phase("weights")
    found = checkpoints.find()
    if found is None:
        state.max_positions = start_from_hf(run, state.parts)
        return
    tensors = saved_tensors(state)
    if found.trainer:
        del tensors["random"]
    elif found.resume:
        with convert_extra_errors(found):
            check_continuity(found.extra, run, state.loader)
            check_extra(found.extra, found.step)
            if found.extra["world_size"] != run.spec.world_size:
                logger.info("saved on %s: random generators begin anew", plural(found.extra["world_size"], "rank"))
                del tensors["random"]
    elif not run.config.checkpoint.allow_change and (unlike := model_problems(found.extra, run)):
        raise UserError(*unlike)
    checkpoints.load(found, tensors, registry.tensor_names(run.spec.model))
    state.max_positions = found.extra.get("max_positions", found.extra.get("seq_len", 0))
    if found.trainer and found.resume:
        resume_from_titan(run, state, found)
    elif found.resume:
        with convert_extra_errors(found):
            restore_extra(state, found.extra)


def saved_tensors(state: TrainState) -> dict[str, Stateful]:
    from quadriga.checkpoint.tensors import ModelState, OptimizerState, RandomState

    return {
        "model": ModelState(state.parts),
        "optimizer": OptimizerState(state.parts, [state.optimizer]),
        "random": RandomState(collectives.rank(), state.device),
    }


def saved_extra(run: Run, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, including the data cursors of all ranks. Call on all ranks."""
    data = state.loader.state_dict()
    for other in all_gather_json(data["lanes"]):
        data["lanes"].update(other)
    return {
        "train_state": {
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "attempt": state.attempt,
            "health": state.health.state_dict(),
        },
        "lr_scheduler": {"done": state.schedule.last_epoch},
        "dataloader": data,
        "max_positions": max(state.max_positions, run.spec.seq_len),
        **run_facts(run),
        "versions": versions(),
    }


def restore_extra(state: TrainState, extra: Mapping[str, Any]) -> None:
    """The inverse of `saved_extra`; parts in `checkpoint.exclude_from_loading` are unchanged."""
    if "train_state" in extra:
        state.step = extra["train_state"]["step"]
        state.tokens_seen = extra["train_state"]["tokens_seen"]
        if "health" in extra["train_state"]:
            state.health.load_state_dict(extra["train_state"]["health"])
    if "lr_scheduler" in extra:
        fast_forward(state.schedule, extra["lr_scheduler"]["done"])
    if "dataloader" not in extra:
        return
    if not state.loader.differences(extra["dataloader"]):
        state.loader.load_state_dict(extra["dataloader"])
    else:  # only with `checkpoint.allow_change`
        logger.warning("the data differ from the checkpoint's: reading begins at their start")


def start_from_hf(run: Run, parts: tuple[nn.Module, ...]) -> int:
    """With `checkpoint.initial_load_in_hf`, load Hugging Face weights into this rank's parts of the model.

    Returns the number of positions that the weights were trained for; 0 if nothing is loaded. Call on all ranks of a
    run without a checkpoint. Raises UserError on every rank if the weights do not fit."""
    section = run.config.checkpoint
    if not (section.enable and section.initial_load_in_hf):
        return 0
    from quadriga.checkpoint.hf import read_hf
    from quadriga.checkpoint.tensors import ModelState

    start, place = time.monotonic(), section.initial_load_path or run.config.model.hf_assets_path
    group = process_group.host_group(section.timeout_seconds)
    names = registry.tensor_names(run.spec.model)
    hf_config = read_hf(place, ModelState(parts).state_dict(), names, group, allow_change=section.allow_change)
    logger.info("weights of %s read in %s", place, format_seconds(time.monotonic() - start))
    return registry.positions_from_hf(hf_config)


def resume_from_titan(run: Run, state: TrainState, found: CheckpointInfo) -> None:
    """Restore everything except tensors from a checkpoint of torchtitan; parts in `checkpoint.exclude_from_loading` are
    unchanged. A warning lists what the checkpoint does not contain. The schedule is this run's, a function of the step.
    """
    if "train_state" in found.extra:
        state.step, tokens = found.extra["train_state"]["step"], found.extra["train_state"]["tokens_seen"]
        if tokens is None:
            tokens = state.step * run.spec.tokens_per_step
            _warn("it does not contain the number of tokens seen: assumed as this run's batch times its steps")
        state.tokens_seen = tokens
    if "lr_scheduler" in found.extra:
        fast_forward(state.schedule, found.extra["lr_scheduler"]["done"])
    if "dataloader" in found.extra:
        _resume_data(run, state, found.extra["dataloader"])


def _resume_data(run: Run, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Continue reading where torchtitan's loader stopped, if the data are read in the same order."""
    training = run.config.training
    why = unknown_position(saved, shuffle=training.dataloader.shuffle, foreign=training.foreign_to_torchtitan)
    if why is None:
        try:
            state.loader.start_at(saved["documents"], saved["tokens_left"])
        except UserError as error:  # of other data; all ranks have the same error
            why = f"{error.problems[0].where} {error.problems[0].what}"
    if why is not None:
        _warn(position_lost(why))
        return
    logger.info(
        "data: reading continues where torchtitan stopped: %s read, %s left to train on",
        plural(saved["documents"], "document"),
        plural(saved["tokens_left"], "id"),
    )
    if training.dataloader.window_overlap:
        _warn(
            "torchtitan's windows do not overlap, but those of this run do: set training.dataloader.window_overlap = 0 "
            "to read as torchtitan does"
        )


def _warn(message: str) -> None:
    """Log on the first rank only, because the message is the same on all."""
    if collectives.rank() == 0:
        logger.warning("%s", message)


def check_continuity(saved: Mapping[str, Any], run: Run, loader: Loader) -> None:
    """Log the differences from the configuration of the checkpoint.

    Raises:
        UserError: the model, the data, the seed or the batch differ, and `checkpoint.allow_change` is not set.
    """
    here = run_facts(run)
    for key, was, now in config_changes(saved["config"], here["config"], started_with(saved)):
        logger.info("changed since this checkpoint was saved: %s: %s -> %s", key, was, now)
    wrong = resume_problems(saved, run)
    if "dataloader" in saved:
        wrong += [
            problem
            for problem in loader.differences(saved["dataloader"])
            if not problem.where.endswith(("seed", "global_batch_size", "seq_len"))  # reported above
        ]
    if refused := shape_problems(saved, run) if run.config.checkpoint.allow_change else wrong:
        raise UserError(*refused)
    for problem in wrong:
        logger.warning("%s is %s; it %s (checkpoint.allow_change)", problem.where, problem.value, problem.what)


def config_changes(saved: Mapping[str, Any], here: Mapping[str, Any], old_defaults: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs between two configurations, except the paths of the run.

    A key that the saved one lacks did not exist then, and has today's default; a key that was removed since is None.
    `old_defaults`: by key, the old values of keys that the saved one may lack and whose default has changed."""
    defaults = dict(flatten(JobConfig().model_dump(mode="json")))
    was, now = {**defaults, **old_defaults, **dict(flatten(saved))}, dict(flatten(here))
    keys = sorted((was.keys() | now.keys()) - PATH_KEYS)
    return [(key, was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)]


def flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
