"""Checked reading of a run's logs, `metrics.jsonl` and `events.jsonl`: one JSON object a line.

A line is checked once, here: whoever reads it later finds each field that is named below of the type that it says. A
line that is none (damaged, forged, of another program) is left out and named with its number; the others are used.
Limits of size stand in `quadriga.limits`; a file beyond one, or one that is no regular file, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga import limits
from quadriga.errors import UserError, shortened
from quadriga.reading import json_type, parse_json, read_lines

Line = dict[str, Any]

# Whole numbers, from 0 (attempts: from 1).
COUNTS = {"attempt", "step", "rank", "tokens_seen", "tokens", "skipped_steps", "world_size", "bytes", "steps_lost"}
# Seconds since the epoch, up to the year 9999: what a calendar can show.
TIMES = {"time", "process_start"}
LATEST = 253_000_000_000
# Durations, in seconds, and shares: finite, from 0.
AMOUNTS = {"seconds", "blocked_seconds", "step_seconds", "elapsed_seconds", "data_wait", "data_wait_share"}
MAX_AMOUNT = 1e12
# Figures: any number, NaN and the infinities included, or null.
FIGURES = {"loss", "max_loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_device", "tflops", "mfu"}
FIGURES |= {"memory_reserved_gib", "memory_active_gib", "memory_peak_gib", "eta_seconds"}
TEXTS = {"kind", "event", "error", "reason", "name", "path"}
LARGEST = 2**63  # of any number: what other programs can hold, and float64 arithmetic takes without overflow
MAX_PARTS = 1000  # of an object or a list within a line
SHOWN = 3  # bad lines that a notice names


@dataclass
class BadLines:
    """The lines of a file that are left out: their number, and of the first ones where they are and why."""

    path: Path
    count: int = 0
    first: list[str] = field(default_factory=list)
    torn: bool = False  # the last one ends without a newline

    def add(self, number: int, why: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"line {number}: {shortened(why, 200)}")

    @property
    def notices(self) -> list[str]:
        """What a user is told: one line, or none."""
        notices = []
        if self.count:
            more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
            some = "1 line is no record" if self.count == 1 else f"{self.count:,} lines are no records"
            notices.append(f"{self.path}: {some} of a run and left out ({'; '.join(self.first)}{more})")
        if self.torn:
            notices.append(f"{self.path}: the last line is half written, as a kill leaves it, and left out")
        return notices


def checked_lines(path: Path, required: Collection[str], bad: BadLines) -> Iterator[tuple[int, Line]]:
    """(number, line): the lines of a file that have the `required` fields, and known fields of their types.

    Others go to `bad`.

    Raises:
        UserError: the file cannot be read, is no regular file, or is beyond a limit of size.
    """
    for number, raw in read_lines(path, longest=limits.LOG_LINE_BYTES, what="log of a run", keep_ends=True):
        if number > limits.LOG_LINES:
            bad.add(number, f"a log of more than {limits.LOG_LINES:,} lines is read no further")
            return
        if not raw.endswith(b"\n"):
            bad.torn = True
            return
        try:
            line = parse_json(raw.strip(), f"line {number}", nan=True)
        except UserError as error:
            bad.add(number, error.problems[0].what)
            continue
        if (wrong := _fault(line, required)) is not None:
            bad.add(number, wrong)
        else:
            yield number, {sys.intern(key): value for key, value in line.items()}


def _fault(line: Any, required: Collection[str]) -> str | None:
    """What is wrong with a line; None: nothing."""
    if not isinstance(line, dict):
        return f"a JSON {json_type(line)} where an object is expected"
    if lacking := [name for name in required if name not in line]:
        return f"it lacks {', '.join(sorted(lacking))}"
    return next((f"{shortened(key)} is {why}" for key, value in line.items() if (why := _wrong(key, value))), None)


def _wrong(key: str, value: Any) -> str | None:
    if isinstance(value, dict | list):
        return _wrong_parts(key, value)
    if key in COUNTS:
        least = 1 if key == "attempt" else 0
        right = type(value) is int and least <= value < LARGEST
        return None if right else f"{shortened(repr(value))}, not a whole number from {least} on"
    if key in TIMES:
        return None if _is_number(value) and 0 <= value <= LATEST else f"{shortened(repr(value))}, not a time"
    if key in AMOUNTS:
        right = _is_number(value) and 0 <= value <= MAX_AMOUNT
        return None if right else f"{shortened(repr(value))}, not a duration or share of 0 or more"
    if key in FIGURES:
        return None if value is None or _is_number(value) else f"{shortened(repr(value))}, not a number"
    if key in TEXTS:
        return None if isinstance(value, str) else f"{shortened(repr(value))}, not text"
    return None


def _wrong_parts(key: str, value: dict[str, Any] | list[Any]) -> str | None:
    """Objects and lists are for further facts, which are few and plain."""
    if key in COUNTS | TIMES | AMOUNTS | FIGURES | TEXTS:
        return f"a JSON {json_type(value)}, not one value"
    parts = value.values() if isinstance(value, dict) else value
    if len(value) > MAX_PARTS or any(isinstance(part, dict | list) for part in parts):
        return f"a JSON {json_type(value)} of more than {MAX_PARTS} parts, or with others within"
    return None


def _is_number(value: Any) -> bool:
    """A float, or an integer that fits one; no boolean."""
    return (type(value) is int and abs(value) < LARGEST) or type(value) is float
