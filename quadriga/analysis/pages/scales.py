"""Maps values to coordinates, and selects the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUND = (1.0, 2.0, 5.0, 10.0)
TOO_CLOSE, TINY = 1e-9, 1e-100
LARGEST = 1e300  # above it, the length of a scale would not be finite


@dataclass(frozen=True)
class Scale:
    """Maps values `low`..`high` to coordinates `start`..`end`. `log`: by the logarithm (values above 0)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values in the scale, at most `most`."""
        return _log_ticks(self.low, self.high, most) if self.log else _ticks(self.low, self.high, most)


def linear(values: Sequence[float], start: float, end: float, *, from_zero: bool = False) -> Scale:
    """A scale that includes all values, with round ends."""
    values = [min(max(value, -LARGEST), LARGEST) for value in values]
    low, high = (0.0, max(values)) if from_zero else (min(values), max(values))
    size = max(abs(low), abs(high))
    if high - low < max(TOO_CLOSE * size, TINY):  # nearly equal values: a scale around them
        low, high = (low, low + 1.0) if size < TINY else (low - size / 10, high + size / 10)
    step = _step(high - low, 6)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale between powers of ten that includes all values, which must be above 0."""
    values = [min(max(value, 1 / LARGEST), LARGEST) for value in values]
    low = 10.0 ** math.floor(math.log10(min(values)) + 1e-9)
    high = 10.0 ** math.ceil(math.log10(max(values)) - 1e-9)
    return Scale(low, high if high > low else 10 * low, start, end, log=True)


def _step(length: float, most: int) -> float:
    """The smallest round step that divides a length into at most `most` parts."""
    rough = length / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in ROUND if power * factor >= rough * (1 - 1e-9))


def _ticks(low: float, high: float, most: int) -> list[float]:
    step = _step(high - low, max(most - 1, 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first + 1 <= most // 2:  # few powers of ten: with ticks between them
        between = [10.0**power * factor for power in range(first - 1, last + 1) for factor in ROUND[:3]]
        return [value for value in between if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    every = max(math.ceil((last - first + 1) / most), 1)
    return [10.0**power for power in range(first, last + 1, every)]
