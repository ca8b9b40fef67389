"""What a checkpoint saves of a run, how a run is restored from it, and which changes of the run are refused then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quadriga.checkpoint.extra_errors import convert_extra_errors
from quadriga.checkpoint.manager import CheckpointManager, Stateful
from quadriga.checkpoint.states import ModelState, OptimizerState, RandomState
from quadriga.comm import collectives
from quadriga.config import Run
from quadriga.config.continuity import resume_problems, run_facts
from quadriga.config.legacy_keys import started_with
from quadriga.config.schema import JobConfig
from quadriga.data.loader import Loader
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.models import registry
from quadriga.optim.schedule import fast_forward
from quadriga.train.hf import start_from_hf
from quadriga.train.run_files import versions
from quadriga.train.state import TrainState
from quadriga.train.titan import resume_from_titan
from quadriga.units import plural

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
            if found.extra["world_size"] != run.spec.world_size:
                logger.info("saved on %s: random generators begin anew", plural(found.extra["world_size"], "rank"))
                del tensors["random"]
    checkpoints.load(found, tensors, registry.titan_names(run.spec.model))
    state.max_positions = found.extra.get("max_positions", found.extra.get("seq_len", 0))
    if found.trainer and found.resume:
        resume_from_titan(run, state, found)
    elif found.resume:
        with convert_extra_errors(found):
            restore_extra(state, found.extra)
            if "train_state" in found.extra and state.step != found.step:
                raise ValueError(f"its train_state is of step {state.step}, the checkpoint of step {found.step}")


def saved_tensors(state: TrainState) -> dict[str, Stateful]:
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
            if not problem.where.endswith(("seed", "global_batch_size"))  # reported above
        ]
    if wrong and not run.config.checkpoint.allow_change:
        raise UserError(*wrong)
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
