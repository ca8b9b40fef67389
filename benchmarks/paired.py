"""A paired timer: two commands alternate step by step, so that a slow period of the machine affects both.

Both commands are started. Then one runs a turn (one step, or several short ones), while SIGSTOP stops the other. Each
pair of turns gives one ratio, reference seconds / own seconds, in which a slow period of the machine cancels out. The
order alternates from pair to pair. The result is the median of the ratios with a bootstrap interval.

A step ends when a line of the output matches a pattern, so each command must print one such line per step. A thread
reads the lines; the command is stopped some tenths of a millisecond later. This delay is equal for both, and is small
because a turn takes at least `MIN_INTERVAL` seconds. Linux only (/proc, SIGSTOP).
"""

from __future__ import annotations

import math
import os
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MIN_INTERVAL = 0.25  # seconds
FEWEST_PAIRS = 5
STEP_LIMIT = 600.0  # seconds without a step, after which a command is considered hung
STOP_TIMEOUT = 10.0  # seconds
RESAMPLES = 4000


@dataclass(frozen=True)
class TimedCommand:
    """A training command. `step_line`: a regular expression that matches one line of output per step."""

    name: str
    argv: Sequence[str]
    step_line: str
    environ: Mapping[str, str]


@dataclass
class Timings:
    """Seconds per step in each pair of turns, of the measured command (`ours`) and the reference."""

    ours: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Speed relative to the reference: above 1, the measured command is faster."""
        return [theirs / mine for mine, theirs in zip(self.ours, self.reference, strict=True)]


@dataclass(frozen=True)
class MedianEstimate:
    """A median, its 95 % confidence interval, and the quartiles of the values."""

    median: float
    low: float
    high: float
    quartile_1: float
    quartile_3: float
    count: int


class CommandFailed(Exception):
    """A command ended or hung before its next step. The message has the last lines of its output."""


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that `finally` runs and no stopped command is left."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def time_interleaved(
    ours: TimedCommand,
    reference: TimedCommand,
    *,
    pairs: int,
    seconds: float,
    warmup: int = 2,
    half_width: float = 0.0,
) -> Timings:
    """Start both commands and time pairs of turns after `warmup` untimed steps of each. Both are killed at the end.

    There are `pairs` pairs, or as many as fit into `seconds` if these are fewer, but at least FEWEST_PAIRS. After these
    it ends as soon as half the interval of the median ratio is at most `half_width`. Raises CommandFailed if a command
    ends or hangs.
    """
    timings = Timings()
    with running_command(reference) as theirs, running_command(ours) as mine:
        for process in (theirs, mine):  # one after the other, so that the starts do not disturb each other
            process.wait_for_step()
            process.stop()
        # Each command warms up without the other, which also measures the length of its steps.
        slowest = max(process.run_steps(steps=1) for _ in range(max(warmup, 1)) for process in (theirs, mine))
        steps = max(1, math.ceil(MIN_INTERVAL / slowest))
        deadline = time.perf_counter() + seconds
        for pair in range(pairs):
            if pair >= FEWEST_PAIRS and (time.perf_counter() > deadline or is_precise(timings.ratios, half_width)):
                break
            order: list[tuple[list[float], RunningCommand]] = [(timings.ours, mine), (timings.reference, theirs)]
            for taken, process in order if pair % 2 else reversed(order):
                taken.append(process.run_steps(steps) / steps)
    return timings


def is_precise(ratios: Sequence[float], half_width: float) -> bool:
    """Whether half the 95 % interval of the median is at most `half_width`; never for 0."""
    if half_width <= 0:
        return False
    estimate = estimate_median(ratios)
    return (estimate.high - estimate.low) / 2 <= half_width


def seconds_to_first_step(command: TimedCommand) -> float:
    """Seconds from the start of the process to its first step line. Then the process is killed."""
    with running_command(command) as process:
        return process.wait_for_step() - process.started_at


def estimate_median(values: Sequence[float]) -> MedianEstimate:
    """The median with a 95 % percentile-bootstrap interval. It is deterministic."""
    draw = random.Random(0)
    resampled = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    ordered = sorted(values)
    return MedianEstimate(
        median=statistics.median(values),
        low=resampled[int(0.025 * RESAMPLES)],
        high=resampled[int(0.975 * RESAMPLES)],
        quartile_1=ordered[len(ordered) // 4],
        quartile_3=ordered[(3 * len(ordered)) // 4],
        count=len(values),
    )


class RunningCommand:
    """A started command with all its children, which can be stopped and continued for some steps."""

    def __init__(self, command: TimedCommand) -> None:
        self.command = command
        self.last_lines: deque[str] = deque(maxlen=25)
        self._steps: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._pattern = re.compile(command.step_line)
        self.started_at = time.perf_counter()
        self._process = subprocess.Popen(
            command.argv,
            env=command.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._pids: list[int] = [self._process.pid]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run_steps(self, steps: int) -> float:
        """Continue, run `steps` steps, stop. Returns the seconds of these steps."""
        while not self._steps.empty():  # lines that were printed before the stop took effect
            self._check(self._steps.get())
        start = time.perf_counter()
        self._signal(signal.SIGCONT)
        for _ in range(steps):
            end = self.wait_for_step()
        self.stop()
        return end - start

    def wait_for_step(self) -> float:
        """Wait for the next step line and return its time. Raises CommandFailed if none comes."""
        try:
            return self._check(self._steps.get(timeout=STEP_LIMIT))
        except queue.Empty:
            raise CommandFailed(f"{self.command.name}: no step in {STEP_LIMIT:.0f} s\n" + self.tail()) from None

    def stop(self) -> None:
        """Stop the processes known from the last stop first, then all current descendants."""
        self._signal(signal.SIGSTOP)
        self._pids = descendants(self._process.pid)
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Kill the children first, so that a launcher can clean up, for at most `STOP_TIMEOUT` seconds."""
        self._pids = descendants(self._process.pid)[1:]
        if self._pids:
            self._signal(signal.SIGKILL)
            self._process.send_signal(signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT)
        self._process.kill()
        self._process.wait()
        self._reader.join(STOP_TIMEOUT)

    def tail(self) -> str:
        return "\n".join(self.last_lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            seen = time.perf_counter()
            self.last_lines.append(line.rstrip())
            if self._pattern.search(line):
                self._steps.put(seen)
        self._steps.put(None)

    def _check(self, seen: float | None) -> float:
        if seen is None:
            raise CommandFailed(f"{self.command.name}: ended before its next step\n" + self.tail())
        return seen

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def running_command(command: TimedCommand) -> Iterator[RunningCommand]:
    running = RunningCommand(command)
    try:
        yield running
    finally:
        running.kill()


def descendants(root: int) -> list[int]:
    """`root` and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found
