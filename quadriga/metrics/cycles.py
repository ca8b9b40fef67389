"""The steps in which the profiler works: cycles of `profiling.profile_freq` steps, each recorded at its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cycle:
    """`warmup` + `active` steps at the end of every `length`."""

    length: int
    warmup: int
    active: int

    @classmethod
    def of_run(cls, profile_freq: int, profiler_warmup: int, profiler_active: int, steps: int) -> Cycle:
        """The cycle for a start of `steps` steps; if there are fewer than a cycle, they are one cycle."""
        length = min(profile_freq, steps)
        active = min(profiler_active, length)
        return cls(length, min(profiler_warmup, length - active), active)

    def disturbs(self, step: int, first_step: int) -> bool:
        """Whether the profiler slows this step of a start that began with `first_step`, because it warms up, records,
        or writes the trace of the cycle before."""
        position = (step - first_step) % self.length
        writes_the_trace = position == 0 and step > first_step
        return writes_the_trace or self.length - position <= self.warmup + self.active
