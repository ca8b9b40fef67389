"""The events of one sort as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.intervals import Spans, spans


@dataclass(frozen=True)
class Rows:
    """Columns of equal length, in the order of the file. Times in seconds from the trace's origin.

    `name` and `thread` are indices into the trace's names and threads; `sort` is a number of `read.HOST` or
    `read.DEVICE`; `link` is torch's External id (an operation and what it launched share it), `correlation` that of a
    launch and its rows on the device; both are 0 where there is none. `told` holds what some rows were called with, by
    row.
    """

    name: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    thread: NDArray[np.int64]
    sort: NDArray[np.int64]
    link: NDArray[np.int64]
    correlation: NDArray[np.int64]
    told: Mapping[int, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.start)

    def spans(self, chosen: NDArray[Any] | None = None) -> Spans:
        return spans(self.start, self.end) if chosen is None else spans(self.start[chosen], self.end[chosen])
