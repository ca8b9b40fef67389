"""The next batch of every rank; if one rank cannot read its data, all ranks stop after the last complete step.

1. A rank whose data cannot be read takes an empty batch, so that it still joins the collectives of the step.
2. After they have their batch, the ranks start an asynchronous SUM all-reduce of a failure flag on a gloo group, and of
   the number of their labels that the loss counts, by which it is divided.
3. Before the optimizer step they read the result. If a rank failed, no rank takes the step: weights and optimizer are
   those of the step before, the cursors in the data are restored, and every rank raises the same `DataFault`.

Invariant: either all ranks take a step with complete batches, or none does. In a validation the ranks wait for the flag
of each batch before they use it, because there is no step to abandon.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from quadriga.data.loader import Batch, Loader
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json, error_from_json, error_to_json


class DataFault(Exception):
    """Raised by all ranks after the last complete step; `error` is the cause."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Feed:
    """Takes batches from a loader, and checks that all ranks have one."""

    def __init__(self, group: dist.ProcessGroup | None = None, copies: int = 1) -> None:
        """`group`: a gloo group of all ranks that only this thread uses; None: no other rank is checked. `copies`: how
        many ranks read the same rows."""
        self._group, self._copies = group, copies
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._own = (0, 0)  # of the last batch
        self._error: Exception | None = None
        self._before: Any = None

    def next(self, loader: Loader) -> Batch:
        """The next batch; an empty one if it cannot be read, which `check` then reports. Without a group, raises
        DataFault at once."""
        self._before = loader.snapshot()
        batch = self._read(loader)
        batch = loader.empty() if batch is None else batch
        self._own = (0, 0) if batch.tokens_read is None else (batch.counted_labels, batch.tokens_read)
        self._start_agreement()
        return batch

    def labels_and_tokens(self) -> tuple[int, int]:
        """The labels of the last batch that the loss counts, and its `tokens_read`, over all ranks, if it has them."""
        if self._pending is None:
            return self._own
        work, numbers = self._pending
        work.wait()
        labels, tokens = numbers[1:].tolist()
        return labels // self._copies, tokens // self._copies

    def check(self, loader: Loader) -> None:
        """Call on all ranks before the step changes anything. Raises DataFault on all ranks if one had no batch; the
        loader then has the state from before `next`."""
        if self._failed_somewhere():
            loader.restore(self._before)
            self._raise_common()

    def one_pass(self, loader: Loader) -> Iterator[Batch]:
        """The batches of one pass over a finite loader, from its beginning. Call on all ranks: if one cannot read a
        batch, all raise DataFault instead of using theirs."""
        iter(loader)
        while True:
            batch = self._read(loader)
            self._start_agreement()
            if self._failed_somewhere():
                self._raise_common()
            if batch is None:
                return
            yield batch

    def _read(self, loader: Loader) -> Batch | None:
        """The next batch; None at the end of a pass, or if it cannot be read: then `_error` is set."""
        self._error = None
        try:
            return loader.next()
        except StopIteration:
            return None
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            if self._group is None:
                raise DataFault(error) from error
            self._error = error
            return None

    def _start_agreement(self) -> None:
        """Start the all-reduce of the failure flag and of the numbers of the batch."""
        if self._group is None:
            return
        numbers = torch.tensor([self._error is not None, *self._own], dtype=torch.int64)
        work = dist.all_reduce(numbers, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        assert work is not None
        self._pending = work, numbers

    def _failed_somewhere(self) -> bool:
        """Whether any rank failed; False without a group."""
        if self._pending is None:
            return False
        (work, numbers), self._pending = self._pending, None
        work.wait()
        return bool(numbers[0].item())

    def _raise_common(self) -> NoReturn:
        records = all_gather_json(None if self._error is None else error_to_json(self._error), self._group)
        raise DataFault(_common_error(records)) from self._error


def _common_error(records: list[Any]) -> Exception:
    """One error for all ranks: all problems that a user can correct, else the error of the first failed rank."""
    errors = [error_from_json(record) for record in records if record is not None]
    problems = dict.fromkeys(problem for error in errors if isinstance(error, UserError) for problem in error.problems)
    return UserError(*problems) if problems else errors[0]
