"""The windows of steps of a run that a comparison counts.

A window is the steps between two records of `metrics.jsonl`. It counts if none of its steps is excluded. Excluded are

- the first `warmup` steps of each start of the run (compilation, caches, growth of the allocator);
- steps in which the profiler warms up or records, and the step after them, in which the trace is written. If fewer than
  FEWEST_WINDOWS windows would remain, these steps count too, with a warning.

Saves and validations are in no window (see quadriga/metrics/meter.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from quadriga.metrics.cycles import Cycle

Record = dict[str, Any]

WARMUP_STEPS = 5
FEWEST_WINDOWS = 3


@dataclass(frozen=True)
class StepWindow:
    """The steps `first` to `last`, and the record of them."""

    first: int
    last: int
    record: Record


def cycle_of(profiling: Mapping[str, Any], steps: int) -> Cycle | None:
    """The profiler's cycle of a table `[profiling]`, for a start of `steps` steps; None without the profiler."""
    if profiling.get("enable_profiling") is not True:
        return None
    return Cycle.of_run(profiling["profile_freq"], profiling["profiler_warmup"], profiling["profiler_active"], steps)


def windows_of(records: Sequence[Record]) -> dict[int, list[StepWindow]]:
    """By attempt, all windows except the first, whose first step is unknown."""
    found: dict[int, list[StepWindow]] = {}
    for attempt, group in groupby(records, key=lambda record: int(record["attempt"])):
        own = list(group)
        found[attempt] = [StepWindow(before["step"] + 1, after["step"], after) for before, after in pairwise(own)]
    return found


def counted_windows(
    records: Sequence[Record], profiling: Mapping[str, Any], steps: int, warmup: int
) -> tuple[list[StepWindow], str | None]:
    """The windows that count, and a warning if they include steps with the profiler, else None.

    `records`: of training, by step; `profiling`: the table of the configuration; `steps`: the last step of the run.
    """
    undisturbed: list[StepWindow] = []
    after_warmup: list[StepWindow] = []
    for windows in windows_of(records).values():
        if not windows:
            continue
        # The first record of the first attempt is of step 1. That of a later attempt may be some steps after its start.
        first_step = windows[0].first - 1
        cycle = cycle_of(profiling, max(steps - first_step + 1, 1))
        for window in windows:
            if window.first < first_step + warmup:
                continue
            after_warmup.append(window)
            # Cycles repeat, so the first cycle's length of steps of a window is enough to check.
            most = window.first + (cycle.length if cycle else 0)
            inside = range(window.first, min(window.last, most) + 1)
            if cycle is None or not any(cycle.disturbs(step, first_step) for step in inside):
                undisturbed.append(window)
    if len(undisturbed) >= FEWEST_WINDOWS or len(undisturbed) == len(after_warmup):
        return undisturbed, None
    return after_warmup, "steps that the profiler slowed are counted, because too few others are left"


def predicted_records(steps: int, log_freq: int) -> list[Record]:
    """The records that a future run will write, without figures."""
    logged = [step for step in range(1, steps + 1) if step == 1 or step % log_freq == 0 or step == steps]
    return [{"step": step, "attempt": 1} for step in logged]
