"""A table of events, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.intervals import Spans, make_spans


@dataclass(frozen=True)
class EventTable:
    """Columns of equal length, in the order of the file. Times in seconds from the trace's origin.

    `name` and `thread` are indices into the trace's names and threads; `category` is a number of `read.HOST_CATEGORIES`
    or `read.DEVICE_CATEGORIES`; `link` is torch's External id (an operation and the rows that it
    launched share it), `correlation` is the id of a launch and its device rows; both are 0 if there is none. `args`:
    arguments of some rows, by row.
    """

    name: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    thread: NDArray[np.int64]
    category: NDArray[np.int64]
    link: NDArray[np.int64]
    correlation: NDArray[np.int64]
    args: Mapping[int, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.start)

    def spans(self, chosen: NDArray[Any] | None = None) -> Spans:
        return make_spans(self.start, self.end) if chosen is None else make_spans(self.start[chosen], self.end[chosen])
