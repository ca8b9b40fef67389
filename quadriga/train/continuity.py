"""Whether a run that goes on from a checkpoint is still the same training, and what else has changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quadriga.config import Run
from quadriga.config.changed_defaults import started_with
from quadriga.config.continuity import facts, refusals
from quadriga.data.loader import Loader
from quadriga.errors import UserError
from quadriga.log import logger

Change = tuple[str, Any, Any]  # the key, what it was, what it is


def check(saved: Mapping[str, Any], run: Run, loader: Loader) -> None:
    """Show what differs from the configuration of the checkpoint.

    Raises UserError where the model, the data, the seed or the batch differ, and `checkpoint.allow_change` is not set.
    """
    here = facts(run)
    for key, was, now in changes(saved["config"], here["config"], started_with(saved)):
        logger.info("changed since this checkpoint was saved: %s: %s -> %s", key, was, now)
    wrong = refusals(saved, run)
    if "dataloader" in saved:
        wrong += [
            problem
            for problem in loader.differences(saved["dataloader"])
            if not problem.where.endswith(("seed", "global_batch_size"))  # said above
        ]
    if wrong and not run.config.checkpoint.allow_change:
        raise UserError(*wrong)
    for problem in wrong:
        logger.warning("%s is %s; it %s (checkpoint.allow_change)", problem.where, problem.value, problem.what)


def changes(saved: Mapping[str, Any], here: Mapping[str, Any], meant: Mapping[str, Any]) -> list[Change]:
    """Every key of two configurations whose value differs; a key that one of them lacks is None there.

    `meant`: what the saved one meant by keys that it may lack, by key."""
    was, now = {**meant, **dict(flat(saved))}, dict(flat(here))
    return [
        (key, was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    ]


def flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
