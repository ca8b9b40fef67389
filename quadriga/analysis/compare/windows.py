"""Which steps of a run count: not the first ones, and none that the profiler slowed down.

A record of `metrics.jsonl` covers the steps since the record before it: a window. A window counts if it is whole, that
is, if no step of it is left out. Left out are

- the first `warmup` steps of each start of the run (compilation, caches, the allocator's growth);
- steps in which the profiler warms up or records, and the step after a recorded cycle, in which its trace is written.
  They are counted after all where fewer than FEWEST_WINDOWS windows would be left, and a warning says so.

Time in which training paused, to save or to validate, is in no window (see quadriga/metrics/meter.py).
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
    """The steps `first` to `last`, and what was logged of them."""

    first: int
    last: int
    record: Record


def cycle_of(profiling: Mapping[str, Any], steps: int) -> Cycle | None:
    """Of a table `[profiling]`, for a start of so many steps; None without the profiler."""
    if profiling.get("enable_profiling") is not True:
        return None
    return Cycle.of_run(profiling["profile_freq"], profiling["profiler_warmup"], profiling["profiler_active"], steps)


def windows_of(records: Sequence[Record]) -> dict[int, list[StepWindow]]:
    """By attempt, the windows whose first step is known: all but the first of an attempt."""
    found: dict[int, list[StepWindow]] = {}
    for attempt, group in groupby(records, key=lambda record: int(record["attempt"])):
        own = list(group)
        found[attempt] = [StepWindow(before["step"] + 1, after["step"], after) for before, after in pairwise(own)]
    return found


def counted_windows(
    records: Sequence[Record], profiling: Mapping[str, Any], steps: int, warmup: int
) -> tuple[list[StepWindow], str | None]:
    """The windows that count, and a warning where steps with the profiler are among them.

    `records`: of training, by step; `profiling`: the table of the configuration; `steps`: the last step of the run.
    """
    undisturbed: list[StepWindow] = []
    after_warmup: list[StepWindow] = []
    for windows in windows_of(records).values():
        if not windows:
            continue
        # The first record of the first attempt is that of step 1; that of a later one may be some steps into it.
        first_step = windows[0].first - 1
        cycle = cycle_of(profiling, max(steps - first_step + 1, 1))
        for window in windows:
            if window.first < first_step + warmup:
                continue
            after_warmup.append(window)
            # Cycles repeat, so one cycle's length of steps tells of a window of any length.
            most = window.first + (cycle.length if cycle else 0)
            inside = range(window.first, min(window.last, most) + 1)
            if cycle is None or not any(cycle.disturbs(step, first_step) for step in inside):
                undisturbed.append(window)
    if len(undisturbed) >= FEWEST_WINDOWS or len(undisturbed) == len(after_warmup):
        return undisturbed, None
    return after_warmup, "steps that the profiler slowed are counted, for too few others are left"


def predicted_records(steps: int, log_freq: int) -> list[Record]:
    """What a run that is still to come will log, without the figures."""
    logged = [step for step in range(1, steps + 1) if step == 1 or step % log_freq == 0 or step == steps]
    return [{"step": step, "attempt": 1} for step in logged]
