"""The next batch of every rank, or none: a rank that cannot read its data ends the run for all at the last whole step.

1. A rank whose data cannot be read takes an empty batch, so that the others' collectives find it where they expect it.
2. Once they have their batch, the ranks start a small MAX all-reduce on a gloo group: did one have none?
3. Before the optimizer they read it. If so, no rank takes the step: weights and optimizer are those of the step before,
   the place in the data is put back, and every rank raises the same `DataFault`.

Invariant: either all ranks take a step with whole batches, or none does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from quadriga.data.batch import Batch
from quadriga.data.loader import Loader
from quadriga.data.packing import Place
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json, error_from_json, error_to_json


class DataFault(Exception):
    """Raised by all ranks alike after the last whole step; `error` is what ended the reading."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Feed:
    """Takes batches from a loader, and agrees with the other ranks that all have one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all ranks, used by this thread alone; None: nobody is asked."""
        self._group = group
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None
        self._error: Exception | None = None
        self._before: dict[int, Place] = {}

    def next(self, loader: Loader) -> Batch:
        """The next batch; an empty one where it cannot be read, of which `check` tells. Raises DataFault where nobody
        is asked."""
        self._error = None
        if self._group is None:
            try:
                return loader.next()
            except Exception as error:
                raise DataFault(error) from error
        self._before = loader.mark()
        try:
            batch = loader.next()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
            batch, self._error = loader.empty(), error
        failed = torch.tensor([self._error is not None], dtype=torch.int64)
        work = dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, failed
        return batch

    def check(self, loader: Loader) -> None:
        """Call on all ranks before the step changes anything. Raises DataFault on all where one had no batch; the
        loader is then where it stood before `next`."""
        if self._under_way is None:
            return
        (work, failed), self._under_way = self._under_way, None
        work.wait()
        if not failed.item():
            return
        loader.back_to(self._before)
        told = all_gather_json(None if self._error is None else error_to_json(self._error), self._group)
        raise DataFault(_common(told)) from self._error


def _common(told: list[Any]) -> Exception:
    """One error for all ranks: every problem that a user can mend, else what the first rank met."""
    errors = [error_from_json(record) for record in told if record is not None]
    problems = dict.fromkeys(problem for error in errors if isinstance(error, UserError) for problem in error.problems)
    return UserError(*problems) if problems else errors[0]
