"""Readable text for bytes, counts, durations and names; groups of a limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
KIB = 1024
MIB = 1024**2
GIB = 1024**3

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # inserted into names by compile and recompute
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def format_some(names: Sequence[str], most: int = 5) -> str:
    """`a, b and 7 more`: the first `most` names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plural(count: int, noun: str) -> str:
    """`1 step`, `1,000 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def format_bytes(amount: float) -> str:
    """`8030261248` -> `7.48 GiB`."""
    for unit, name in ((1024**4, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(amount) >= unit:
            return f"{amount / unit:.2f} {name}"
    return f"{amount:.0f} B"


def format_count(amount: float) -> str:
    """`8030261248` -> `8.03 B`. Numbers below ten thousand are written in full."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(amount) >= unit:
            return f"{amount / unit:.2f} {name}"
    return f"{amount / 1e3:.1f} k" if abs(amount) >= 1e4 else f"{amount:,.0f}"


def format_seconds(seconds: float) -> str:
    """`4210.3` -> `1h10m`. Durations below one minute have one decimal."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yields consecutive items in groups with a size of at most `most`; a larger item is a group by itself."""
    group: list[T] = []
    total = 0
    for item in items:
        more = size(item)
        if group and total + more > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += more
    if group:
        yield group
