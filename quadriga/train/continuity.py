"""Compares a resumed run with its checkpoint: refuses another training, and reports other changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quadriga.config import Run
from quadriga.config.changed_defaults import started_with
from quadriga.config.continuity import resume_problems, run_facts
from quadriga.config.schema import JobConfig
from quadriga.data.loader import Loader
from quadriga.errors import UserError
from quadriga.log import logger

Change = tuple[str, Any, Any]  # the key, what it was, what it is
PATH_KEYS = {"job.config_file", "job.dump_folder"}  # other paths do not change the run


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
