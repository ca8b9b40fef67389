"""Sets of time: arrays of shape (n, 2), float64, of starts and ends; sorted and apart where they come from `union`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.float64]
EMPTY: Spans = np.empty((0, 2))


def make_spans(starts: Iterable[float], ends: Iterable[float]) -> Spans:
    return np.column_stack([np.asarray(starts, dtype=np.float64), np.asarray(ends, dtype=np.float64)])


def union(*sets: Spans) -> Spans:
    """The time in any of the spans, given in any order; touching spans become one, empty ones vanish."""
    every = np.concatenate([EMPTY, *sets])
    every = every[every[:, 1] > every[:, 0]]
    if not len(every):
        return EMPTY
    every = every[np.argsort(every[:, 0], kind="stable")]
    reach = np.maximum.accumulate(every[:, 1])
    begins = np.concatenate([[True], every[1:, 0] > reach[:-1]])
    last = np.concatenate([np.flatnonzero(begins)[1:] - 1, [len(every) - 1]])
    return np.column_stack([every[begins, 0], reach[last]])


def clip(found: Spans, start: float, end: float) -> Spans:
    """What of a union lies between two moments."""
    first, last = np.searchsorted(found[:, 1], start, "right"), np.searchsorted(found[:, 0], end, "left")
    return np.clip(found[first:last], start, end)


def subtract(found: Spans, other: Spans) -> Spans:
    """The time in the union `found` that is not in the union `other`."""
    if not len(found) or not len(other):
        return found
    # The time outside of `other` is a union too: of the gaps between its spans.
    gaps = np.column_stack([np.concatenate([[-np.inf], other[:, 1]]), np.concatenate([other[:, 0], [np.inf]])])
    return intersection(found, gaps)


def intersection(found: Spans, other: Spans) -> Spans:
    """The time in two unions at once."""
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
    """Of a union, in its unit."""
    return float((found[:, 1] - found[:, 0]).sum())


def window_index(moments: NDArray[np.float64], windows: Spans) -> NDArray[np.intp]:
    """By moment, which of the windows holds it; -1: none. The windows are sorted and apart."""
    if not len(windows):
        return np.full(len(moments), -1, dtype=np.intp)
    place = np.searchsorted(windows[:, 0], moments, "right") - 1
    return np.where((place >= 0) & (moments < windows[np.maximum(place, 0), 1]), place, -1)
