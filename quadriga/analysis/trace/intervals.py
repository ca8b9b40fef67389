"""Sets of time: float64 arrays (n, 2) of starts and ends. Those of `union` are sorted and disjoint (a union)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.float64]
EMPTY: Spans = np.empty((0, 2))


def make_spans(starts: Iterable[float], ends: Iterable[float]) -> Spans:
    return np.column_stack([np.asarray(starts, dtype=np.float64), np.asarray(ends, dtype=np.float64)])


def union(*sets: Spans, gap: float = 0.0) -> Spans:
    """The time in any of the spans, which may be in any order. Touching spans are merged, empty ones dropped.

    Gaps of at most `gap` are closed.
    """
    every = np.concatenate([EMPTY, *sets])
    every = every[every[:, 1] > every[:, 0]]
    if not len(every):
        return EMPTY
    every = every[np.argsort(every[:, 0], kind="stable")]
    reach = np.maximum.accumulate(every[:, 1])
    begins = np.concatenate([[True], every[1:, 0] - reach[:-1] > gap])
    last = np.concatenate([np.flatnonzero(begins)[1:] - 1, [len(every) - 1]])
    return np.column_stack([every[begins, 0], reach[last]])


def clip(found: Spans, start: float, end: float) -> Spans:
    """The part of a union between two moments."""
    first, last = np.searchsorted(found[:, 1], start, "right"), np.searchsorted(found[:, 0], end, "left")
    return np.clip(found[first:last], start, end)


def subtract(found: Spans, other: Spans) -> Spans:
    """The time in the union `found` that is not in the union `other`."""
    if not len(found) or not len(other):
        return found
    # The time outside of `other` is the union of the gaps between its spans.
    gaps = np.column_stack([np.concatenate([[-np.inf], other[:, 1]]), np.concatenate([other[:, 0], [np.inf]])])
    return intersection(found, gaps)


def intersection(found: Spans, other: Spans) -> Spans:
    """The time in both unions."""
    if not len(found) or not len(other):
        return EMPTY
    first = np.searchsorted(other[:, 1], found[:, 0], "right")
    last = np.searchsorted(other[:, 0], found[:, 1], "left")
    counts = np.maximum(last - first, 0)
    own = np.repeat(np.arange(len(found)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    starts = np.maximum(found[own, 0], other[within, 0])
    ends = np.minimum(found[own, 1], other[within, 1])
    kept = ends > starts
    return np.column_stack([starts[kept], ends[kept]])


def total_length(found: Spans) -> float:
    """The length of a union, in its unit."""
    return float((found[:, 1] - found[:, 0]).sum())


def window_index(moments: NDArray[np.float64], windows: Spans) -> NDArray[np.intp]:
    """The index of the window that contains each moment; -1 if none does. Windows are sorted and disjoint."""
    if not len(windows):
        return np.full(len(moments), -1, dtype=np.intp)
    place = np.searchsorted(windows[:, 0], moments, "right") - 1
    return np.where((place >= 0) & (moments < windows[np.maximum(place, 0), 1]), place, -1)
