"""Checked reading of a run's logs, `metrics.jsonl` and `events.jsonl`: one JSON object per line.

Lines are checked here, once: each field listed below has the type of its list for all later readers. A line that is no
record (damaged, forged, of another program) is left out and reported with its number; the others are used. The limits
of size are in `quadriga.limits`. A file beyond a limit, or one that is no regular file, is refused.
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
# Seconds since the epoch, up to the year 9999, the limit of `datetime`.
TIMES = {"time", "process_start"}
LATEST = 253_000_000_000
# Durations in seconds, and shares: finite, from 0.
AMOUNTS = {"seconds", "blocked_seconds", "step_seconds", "elapsed_seconds", "data_wait", "data_wait_share"}
MAX_AMOUNT = 1e12
# Figures: any number, including NaN and infinities, or null.
FIGURES = {"loss", "max_loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_device", "tflops", "mfu"}
FIGURES |= {"mfu_bfloat16", "memory_reserved_gib", "memory_active_gib", "memory_peak_gib", "eta_seconds"}
TEXTS = {"kind", "event", "error", "reason", "name", "path"}
LARGEST = 2**63  # limit of integers: other programs can hold them, and float64 arithmetic does not overflow
MAX_PARTS = 1000  # of an object or a list within a line
SHOWN = 3  # bad lines that a notice names


@dataclass
class BadLines:
    """The lines of a file that are left out: their count, and the numbers and reasons of the first ones."""

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
        """The messages for the user: at most one about bad lines and one about an incomplete last line."""
        notices = []
        if self.count:
            more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
            some = "1 line is no record" if self.count == 1 else f"{self.count:,} lines are no records"
            notices.append(f"{self.path}: {some} of a run and left out ({'; '.join(self.first)}{more})")
        if self.torn:
            notices.append(f"{self.path}: the last line is incomplete, as after a kill, and left out")
        return notices


def checked_lines(path: Path, required: Collection[str], bad: BadLines) -> Iterator[tuple[int, Line]]:
    """(number, line): the lines of a file that have the `required` fields, and whose known fields have valid values.

    Other lines are added to `bad`.

    Raises:
        UserError: the file cannot be read, is no regular file, or is beyond a limit of size.
    """
    for number, raw in read_lines(path, longest=limits.LOG_LINE_BYTES, what="log of a run", keep_ends=True):
        if number > limits.LOG_LINES:
            bad.add(number, f"a log is read up to line {limits.LOG_LINES:,} only")
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
    """The fault of a line; None if it has none."""
    if not isinstance(line, dict):
        return f"a JSON {json_type(line)}, not an object"
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
    """Objects and lists hold further facts, which must be few and not nested."""
    if key in COUNTS | TIMES | AMOUNTS | FIGURES | TEXTS:
        return f"a JSON {json_type(value)}, not one value"
    parts = value.values() if isinstance(value, dict) else value
    if len(value) > MAX_PARTS or any(isinstance(part, dict | list) for part in parts):
        return f"a JSON {json_type(value)} of more than {MAX_PARTS} parts, or with nested parts"
    return None


def _is_number(value: Any) -> bool:
    """A float, or an integer below `LARGEST`; not a boolean."""
    return (type(value) is int and abs(value) < LARGEST) or type(value) is float
