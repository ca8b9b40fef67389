"""Whether a run that goes on from a checkpoint is still the same training, and what else has changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from quadriga.config import Run
from quadriga.data.loader import Loader, differences
from quadriga.errors import Problem, UserError
from quadriga.log import logger

NAMES = {"name", "flavor"}  # of a model: what counts is its numbers
FIX = "restore what it was, begin another run (--job.dump_folder), or go on all the same: --checkpoint.allow_change"
Change = tuple[str, Any, Any]  # the key, what it was, what it is


def facts(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration, to be weighed by `check` and read by a person."""
    return {
        "config": run.config.model_dump(mode="json"),
        "model": asdict(run.spec.model),
        "seq_len": run.spec.seq_len,
        "seed": run.spec.seed,
        "global_batch_size": run.spec.global_batch_size,
        "world_size": run.spec.world_size,
        "layout": asdict(run.spec.degrees),
    }


def check(saved: Mapping[str, Any], run: Run, loader: Loader) -> None:
    """Show what differs from the configuration of the checkpoint.

    Raises UserError where the model, the data, the seed or the batch differ, and `checkpoint.allow_change` is not set.
    """
    here = facts(run)
    for key, was, now in changes(saved["config"], here["config"]):
        logger.info("changed since this checkpoint was saved: %s: %s -> %s", key, was, now)
    wrong = [
        Problem(key, f"was {was} when the checkpoint was saved", value=str(now), fix=FIX)
        for key, was, now in other_training(saved, here)
    ]
    if "dataloader" in saved:
        wrong += [
            problem
            for problem in differences(saved["dataloader"]["fingerprint"], loader.fingerprint)
            if not problem.where.endswith(("seed", "global_batch_size"))  # said above
        ]
    if wrong and not run.config.checkpoint.allow_change:
        raise UserError(*wrong)
    for problem in wrong:
        logger.warning("%s is %s; it %s (checkpoint.allow_change)", problem.where, problem.value, problem.what)


def other_training(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Change]:
    """The differences that make it another training: of the model, the length of sequences, the seed, the batch."""
    for name in here["model"].keys() - NAMES:
        was, now = saved["model"].get(name), here["model"][name]
        if was != now:
            yield f"model.{name}", was, now
    for name, key in (
        ("seq_len", "training.seq_len"),
        ("seed", "debug.seed"),
        ("global_batch_size", "training.global_batch_size"),
    ):
        if saved[name] != here[name]:
            yield key, saved[name], here[name]


def changes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """Every key of two configurations whose value differs; a key that one of them lacks is None there."""
    was, now = dict(flat(saved)), dict(flat(here))
    return [
        (key, was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    ]


def flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
