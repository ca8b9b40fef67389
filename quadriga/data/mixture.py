"""Mixtures: the source of each row of each step, as a function of the weights, the seed and the step alone.

The windows of a run are slots: slot t * B + i is window i of step t, where B is the global batch size. A stage gives
each source a share of its slots. The sources of one period are ordered by Tijdeman's rule (The chairman assignment
problem, Discrete Mathematics 32, 1980): at any slot, each source is less than one window from its exact share. The
order repeats after the period, so the source of any slot is found without the slots before it.

Within a step a permutation, keyed by seed and step, assigns the slots to the rows. Without it a row would meet the same
source at every step where the batch is a multiple of the period.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import reduce
from math import gcd

import numpy as np
import numpy.typing as npt

from quadriga.config.mixing import StageShares
from quadriga.data.streams import shuffled


def order_of_a_period(parts: Sequence[int]) -> npt.NDArray[np.int32]:
    """The sources of the slots of one period, by Tijdeman's rule: int32, shape (sum of `parts` / their divisor,).

    Source i gets its windows k = 0, 1, ... in slots t = 1, 2, ...: window k may be taken from the first slot t with
    t * share >= k + slack on, where slack is 1 / (2n - 2) for n sources. Among the windows that may be taken, the one
    with the earliest deadline (k + 1 - slack) / share is next. Integers only, so the order is the same everywhere.
    """
    divisor = reduce(gcd, parts)
    weights = [part // divisor for part in parts]
    period, sources = sum(weights), len(weights)
    order = np.zeros(period, np.int32)
    if sources == 1:
        return order
    scale = 2 * sources - 2  # slack = 1 / scale; times are compared as fractions with this denominator
    eligible: list[tuple[int, int, int]] = []  # deadline, rounded up to whole slots; source; number of the window
    waiting: list[tuple[int, int, int]] = []  # first slot; source; number of the window

    def wait(source: int, number: int) -> None:
        first = -(-period * (number * scale + 1) // (weights[source] * scale))
        heapq.heappush(waiting, (first, source, number))

    for source in range(sources):
        wait(source, 0)
    for slot in range(1, period + 1):
        while waiting and waiting[0][0] <= slot:
            _, source, number = heapq.heappop(waiting)
            deadline = -(-period * ((number + 1) * scale - 1) // (weights[source] * scale))
            heapq.heappush(eligible, (deadline, source, number))
        _, source, number = heapq.heappop(eligible)
        order[slot - 1] = source
        if number + 1 < weights[source]:
            wait(source, number + 1)
    return order


class Mixture:
    """The source of each row, and the number of its window within the source, at any step.

    Raises ValueError: no stage at step 0, stages that are not in order, or shares of another number of sources.
    """

    def __init__(self, stages: Sequence[StageShares], global_batch_size: int, seed: int) -> None:
        firsts = [stage.first for stage in stages]
        if not firsts or firsts[0] != 0 or sorted(set(firsts)) != firsts:
            raise ValueError(f"stages must begin at step 0 and at later steps, in order: {firsts}")
        if len({len(stage.parts) for stage in stages}) != 1:
            raise ValueError("each stage needs a share for each source")
        self.stages = tuple(stages)
        self._batch, self._seed = global_batch_size, seed
        self._periods = [_Period(stage.parts) for stage in stages]
        before = np.zeros(len(stages[0].parts), np.int64)
        self._before = [before]  # windows of each source before each stage
        for stage, following, period in zip(stages, stages[1:], self._periods, strict=False):
            before = before + period.counts((following.first - stage.first) * global_batch_size)
            self._before.append(before)

    def rows(self, step: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """For each row of the global batch: its source, int32, and the number of its window in that source, int64.

        Both have the shape (global batch size,). Window n of a source comes before window n + 1, over all stages.
        """
        sources, numbers = self._slots(step)
        order = shuffled(self._batch, f"{self._seed} {step} rows")
        return sources[order], (numbers + self._before[self._stage(step)][sources])[order]

    def windows_in(self, step: int) -> npt.NDArray[np.int64]:
        """The number of windows of each source in a step: int64, shape (sources,)."""
        return np.bincount(self._slots(step)[0], minlength=len(self._before[0]))

    def windows_before(self, step: int) -> npt.NDArray[np.int64]:
        """The number of windows of each source in the steps before `step`: int64, shape (sources,)."""
        index = self._stage(step)
        slots = (step - self.stages[index].first) * self._batch
        return self._before[index] + self._periods[index].counts(slots)

    def _slots(self, step: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The source of each slot of a step, and the number of its window since the stage began."""
        index = self._stage(step)
        first = (step - self.stages[index].first) * self._batch
        return self._periods[index].slots(np.arange(first, first + self._batch, dtype=np.int64))

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"there is no step {step}")
        return max(index for index, stage in enumerate(self.stages) if stage.first <= step)


class _Period:
    """The order of the slots of a stage, which repeats after each period."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        read = np.flatnonzero(parts).astype(np.int32)
        self.order = read[order_of_a_period([parts[source] for source in read])]
        sources = len(parts)
        self.per_period = np.bincount(self.order, minlength=sources).astype(np.int64)
        by_source = np.argsort(self.order, kind="stable")
        firsts = np.cumsum(self.per_period) - self.per_period  # of each source, in `by_source`
        self.numbers = np.empty(len(self.order), np.int64)  # of the windows of a source within the period
        self.numbers[by_source] = np.arange(len(self.order)) - np.repeat(firsts, self.per_period)

    def slots(self, slots: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The source of each slot of the stage, and the number of its window since the stage began."""
        periods, places = np.divmod(slots, len(self.order))
        sources = self.order[places]
        return sources, periods * self.per_period[sources] + self.numbers[places]

    def counts(self, slots: int) -> npt.NDArray[np.int64]:
        """The windows of each source in the first `slots` slots of the stage."""
        periods, rest = divmod(slots, len(self.order))
        return periods * self.per_period + np.bincount(self.order[:rest], minlength=len(self.per_period))
