"""A run of torchtitan goes on here: the step, the tokens, the learning rate, and the place in the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.messages import position_lost, unknown_position
from quadriga.comm import collectives
from quadriga.config import Run
from quadriga.config.messages import plural
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.optim.schedule import fast_forward
from quadriga.train.state import TrainState


def resume_from_titan(run: Run, state: TrainState, found: CheckpointInfo) -> None:
    """Put what is no tensor where a checkpoint of torchtitan stood; parts that `checkpoint.exclude_from_loading` took
    out stay as they are. One line says what could not be known. The schedule is this run's: a function of the step.
    """
    if "train_state" in found.extra:
        state.step, tokens = found.extra["train_state"]["step"], found.extra["train_state"]["tokens_seen"]
        if tokens is None:
            tokens = state.step * run.spec.tokens_per_step
            _warn("it does not say how many tokens it has seen: taken as this run's batch times its steps")
        state.tokens_seen = tokens
    if "lr_scheduler" in found.extra:
        fast_forward(state.schedule, found.extra["lr_scheduler"]["done"])
    if "dataloader" in found.extra:
        _resume_data(run, state, found.extra["dataloader"])


def _resume_data(run: Run, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Read on where torchtitan's loader stood, if these data are read in the order in which it reads them."""
    dataloader = run.config.training.dataloader
    why = unknown_position(saved, dataloader.shuffle)
    if why is None:
        try:
            state.loader.start_at(saved["documents"], saved["tokens_left"])
        except UserError as error:  # of other data: every rank meets the same
            why = f"{error.problems[0].where} {error.problems[0].what}"
    if why is not None:
        _warn(position_lost(why))
        return
    logger.info(
        "data: reading goes on where torchtitan stopped: %s read, with %s still to be trained on",
        plural(saved["documents"], "document"),
        plural(saved["tokens_left"], "id"),
    )
    if dataloader.window_overlap:
        _warn(
            "torchtitan's windows do not overlap, and here they do: training.dataloader.window_overlap = 0 reads as it "
            "would have"
        )


def _warn(message: str) -> None:
    """On the first rank alone: every rank finds the same."""
    if collectives.rank() == 0:
        logger.warning("%s", message)
