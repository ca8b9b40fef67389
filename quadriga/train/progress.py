"""Where this rank stands, for those who watch it from other threads: the watchdog, and the words of a fault."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Progress:
    """`step` is the one under way, from 1; `phase` one of build, load, data, forward and backward, gradient norm,
    optimizer, record, validate, save, leave. `since` is when the phase began, in seconds of time.monotonic()."""

    step: int = 0
    phase: str = "build"
    since: float = field(default_factory=time.monotonic)

    def at(self, phase: str, step: int | None = None) -> None:
        """Say that the rank has come to a phase."""
        self.since = time.monotonic()
        self.phase = phase
        self.step = self.step if step is None else step

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase, and after it the phase before, begun anew."""
        before = self.phase
        self.at(phase)
        yield
        self.at(before)

    @property
    def seconds(self) -> float:
        """For how long the rank has been in its phase."""
        return time.monotonic() - self.since
