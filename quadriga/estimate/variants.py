"""Runs like a given one with a few choices changed. For advice and search, which look at thousands of them.

A variant is not read through the door again: only what changes is worked out anew, by the same arithmetic. Whoever
proposes one keeps to the rules, and a winner is written as a configuration that goes through the door like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quadriga.config import Run
from quadriga.config.run_spec import Degrees

DEGREE_KEYS = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")


@dataclass(frozen=True)
class Variant:
    """What is changed: keys of the configuration with their values, and the run that results."""

    changes: tuple[tuple[str, Any], ...]
    run: Run

    def as_arguments(self) -> list[str]:
        return [f"--{key}={_shown(value)}" for key, value in self.changes]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def vary(run: Run, **changes: Any) -> Variant:
    """`run` with other values; names are keys with `__` for the dot."""
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


def _spec(run: Run, config: Any) -> Any:
    """What follows anew: degrees, accumulation, micro-batches, resharding, the ranks of stages."""
    parallelism, training, old = config.parallelism, config.training, run.spec
    others = {axis: getattr(parallelism, key) for axis, key in DEGREE_KEYS.items() if axis != "dp_shard"}
    rest = others["dp_replicate"] * others["cp"] * others["tp"] * others["pp"]
    degrees = Degrees(dp_shard=old.world_size // rest, **others)
    one_pass = training.local_batch_size * degrees.batch
    global_batch = one_pass if training.global_batch_size == -1 else training.global_batch_size
    accumulation = max(global_batch // one_pass, 1)
    in_pipeline = training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    reshard = parallelism.fsdp_reshard_after_forward
    return replace(
        old,
        degrees=degrees,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        global_batch_size=accumulation * one_pass,
        accumulation_steps=accumulation,
        micro_batches=accumulation * (in_pipeline if degrees.pp > 1 else 1),
        reshard_after_forward=degrees.pp == 1 if reshard == "default" else reshard == "always",
        reduce_gradients=old.reduce_gradients
        if parallelism.reduce_gradients == "auto"
        else parallelism.reduce_gradients,
        stage_ranks=stage_ranks(parallelism.pipeline_parallel_schedule, degrees.pp, old, parallelism),
    )


def stages_a_rank(schedule: str) -> int:
    return 1 if schedule in ("1F1B", "GPipe") else 2


def stage_ranks(schedule: str, ranks: int, old: Any, parallelism: Any) -> tuple[int, ...]:
    """Which rank holds each stage: in a loop, or in a V."""
    if ranks == old.degrees.pp and len(old.stage_ranks) > 1 and schedule not in V_SCHEDULES:
        return tuple(old.stage_ranks)
    around = range(ranks)
    if stages_a_rank(schedule) == 1:
        return tuple(around)
    return (*around, *(reversed(around) if schedule in V_SCHEDULES else around))
