"""A run of torchtitan goes on here: the step, the tokens, the learning rate, and the place in the data."""

from __future__ import annotations

from quadriga.checkpoint.folder import Found
from quadriga.config import Run
from quadriga.log import logger
from quadriga.optim.schedule import wind_to
from quadriga.train.state import TrainState


def go_on_from_titan(run: Run, state: TrainState, found: Found) -> None:
    """Put what is no tensor where a checkpoint of torchtitan stood; parts that `checkpoint.exclude_from_loading` took
    out stay as they are. One line says what could not be known. Its schedule is this run's: a function of the step.
    """
    if "train_state" in found.extra:
        state.step, tokens = found.extra["train_state"]["step"], found.extra["train_state"]["tokens_seen"]
        if tokens is None:
            tokens = state.step * run.spec.tokens_per_step
            logger.warning("it does not say how many tokens it has seen: taken as this run's batch times its steps")
        state.tokens_seen = tokens
    if "lr_scheduler" in found.extra:
        wind_to(state.schedule, found.extra["lr_scheduler"]["done"])
    if "dataloader" in found.extra:
        why = found.extra["dataloader"].get("unknown")
        if why is not None:
            logger.warning("the place in the data is not known: %s. Reading begins at the start of the data", why)
