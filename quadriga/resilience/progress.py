"""The step and phase of this rank, for readers in other threads: the watchdog and the failure report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Progress:
    """`step` is the current step, from 1; 0 before the first. `phase` is one of start, rendezvous, data, weights;
    in a step data, forward and backward, gradient norm, optimizer, record; then validate, save, leave. `since` is the
    start of the phase, in seconds of time.monotonic(). `ticks` counts units of progress within phases."""

    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.monotonic)
    ticks: int = 0
    before_first_pass: Callable[[], None] | None = None  # called once, when the first batch is ready

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """Record that the rank enters a phase."""
        if phase == "forward and backward" and self.before_first_pass is not None:
            wait_for_all, self.before_first_pass = self.before_first_pass, None
            wait_for_all()
        self.since = time.monotonic()
        self.phase = phase
        self.step = self.step if step is None else step

    def tick(self) -> None:
        """Record progress within the phase."""
        self.ticks += 1

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Enter a phase; afterwards re-enter the phase before it."""
        before = self.phase
        self.enter_phase(phase)
        yield
        self.enter_phase(before)

    @property
    def seconds(self) -> float:
        """Seconds that the rank has been in its phase."""
        return time.monotonic() - self.since
