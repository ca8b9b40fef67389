"""Formats figures for a page: three significant digits, and a suitable unit; and the columns of tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINUS = "−"


def format_number(value: float) -> str:
    """Three significant digits: `0.0123`, `12.3`, `1,230`; very small and very large values with a power of ten."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = float(f"{abs(value):.2e}")
    sign = MINUS if value < 0 else ""
    if size < 1e-3 or size >= 1e7:
        digits, _, power = f"{size:.2e}".partition("e")
        return f"{sign}{digits}e{int(power)}"
    decimals = max(2 - math.floor(math.log10(size)), 0)
    return f"{sign}{size:,.{decimals}f}"


def format_duration(seconds: float) -> str:
    """`1.23 s`, `45.6 ms`, `7.89 µs`."""
    size = abs(seconds)
    if size >= 0.9995 or size == 0:
        return f"{format_number(seconds)} s"
    return f"{format_number(seconds * 1e3)} ms" if size >= 0.9995e-3 else f"{format_number(seconds * 1e6)} µs"


def format_share(part: float) -> str:
    """`0.254` -> `25.4 %`."""
    return f"{MINUS if part < 0 else ''}{abs(part) * 100:.1f} %"


def trim_zeros(text: str) -> str:
    """Without trailing zeros: `0.920` -> `0.92`, `50.0 ms` -> `50 ms`."""
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda found: f".{found[1]}" if found[1] else "", text)


def format_decimal_bytes(amount: float) -> str:
    """`2500000` -> `2.5 MB`: for axes whose ticks are powers of ten."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= unit * (1 - 1e-9):
            return f"{trim_zeros(format_number(amount / unit))} {name}"
    return f"{trim_zeros(format_number(amount))} B"


def format_whole(value: float) -> str:
    """A count: `1,234`; with one decimal if it is not whole, such as a mean of counts."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


@dataclass(frozen=True)
class Column:
    """A column of a table. `key`: of its values in the rows; None is shown as "not measurable".

    `formatter`: makes text of figures, which are aligned to the right; None: the values are text.
    """

    title: str
    key: Any
    formatter: Callable[[Any], str] | None = None

    def cell(self, row: Mapping[Any, Any]) -> Any:
        value = row.get(self.key)
        return value if value is None or self.formatter is None else self.formatter(value)


def format_table(columns: Sequence[Column], rows: Sequence[Mapping[Any, Any]]) -> Iterator[str]:
    """A table for a terminal. None is shown as `-`."""
    cells = [["-" if (cell := column.cell(row)) is None else str(cell) for column in columns] for row in rows]
    titles, are_figures = [column.title for column in columns], [column.formatter is not None for column in columns]
    return (f"  {line}".rstrip() for line in aligned_lines([titles, *cells], are_figures))


def aligned_lines(rows: Sequence[Sequence[str]], to_the_right: Sequence[bool]) -> Iterator[str]:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, to_the_right, strict=True)
        yield "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
