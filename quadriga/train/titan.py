"""Continues a run of torchtitan: restores the step, the tokens, the learning rate, and the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.messages import position_lost, unknown_position
from quadriga.comm import collectives
from quadriga.config import Run
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.optim.schedule import fast_forward
from quadriga.train.state import TrainState
from quadriga.units import plural


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
    dataloader = run.config.training.dataloader
    why = unknown_position(saved, dataloader.shuffle)
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
    if dataloader.window_overlap:
        _warn(
            "torchtitan's windows do not overlap, but those of this run do: set training.dataloader.window_overlap = 0 "
            "to read as torchtitan does"
        )


def _warn(message: str) -> None:
    """Log on the first rank only, because the message is the same on all."""
    if collectives.rank() == 0:
        logger.warning("%s", message)
