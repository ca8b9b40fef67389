"""Variants of a run: the same run with some keys changed. For advice and search, which try thousands of them.

A variant is not validated again; only the values that depend on the changed keys are recomputed, by the same code. The
caller must propose valid values. A winner is written as a configuration, and is validated like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from quadriga.comm.backend import BACKENDS
from quadriga.config import JobConfig, Run
from quadriga.config.resolve import DEGREES, build_spec
from quadriga.config.rules import RuleContext, config_value
from quadriga.config.rules_pipeline import SINGLE_STAGE
from quadriga.config.run_spec import Degrees, RunSpec


@dataclass(frozen=True)
class Variant:
    """`changes`: keys of the configuration with their new values. `run`: the result."""

    changes: tuple[tuple[str, Any], ...]
    run: Run

    def as_arguments(self) -> list[str]:
        return [f"--{key}={format_argument(value)}" for key, value in self.changes]


def format_argument(value: Any) -> str:
    """A value as written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def vary(run: Run, **changes: Any) -> Variant:
    """`run` with other values. The names of `changes` are keys with `__` for the dot."""
    named = tuple((name.replace("__", "."), value) for name, value in changes.items())
    config = run.config
    tables: dict[str, dict[str, Any]] = {}
    for key, value in named:
        table, name = key.split(".")
        tables.setdefault(table, {})[name] = value
    config = config.model_copy(
        update={table: getattr(config, table).model_copy(update=values) for table, values in tables.items()}
    )
    return Variant(named, Run(config, _spec(run, config), run.origin))


def _spec(run: Run, config: JobConfig) -> RunSpec:
    """The run's derived values, computed as in `resolve`: degrees, accumulation, micro-batches, stages."""
    others = {axis: config_value(config, key) for axis, key in DEGREES.items() if axis != "dp_shard"}
    degrees = Degrees(dp_shard=run.spec.world_size // math.prod(others.values()), **others)
    spec = build_spec(
        RuleContext(config, run.origin, run.spec.model, degrees, run.spec.tokenizer, BACKENDS, training=False)
    )
    before, after = run.config.parallelism, config.parallelism
    same = before.pipeline_parallel_schedule == after.pipeline_parallel_schedule and degrees.pp == run.spec.degrees.pp
    if not same:
        return spec
    return replace(spec, stage_ranks=run.spec.stage_ranks, custom_schedule=run.spec.custom_schedule)  # of a CSV file


def stages_a_rank(schedule: str) -> int:
    return 1 if schedule in SINGLE_STAGE else 2
