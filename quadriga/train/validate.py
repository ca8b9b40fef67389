"""Validation: the loss of each held-out set, on the same windows on every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from quadriga.comm.mesh import Mesh
from quadriga.data.loader import IGNORE, Batch, Loader
from quadriga.errors import Problem, UserError
from quadriga.parallel.data_parallel import free_gathered_parameters
from quadriga.train.feed import Feed
from quadriga.train.step import ForwardBackward

KEPT_BYTES = 1 << 26  # of batches of all sets that a rank keeps, so that they are read and tokenized once
LARGE_SHARE = 0.05  # of the time between two validations


class HeldOutSet:
    """One held-out set on this rank. `label`: its name in metrics, if there are several. `table`: for messages.

    The batches of the first pass stay in host memory, if they have at most `kept_bytes`. All ranks decide the same,
    because their batches have the same sizes.
    """

    def __init__(self, label: str | None, table: str, loader: Loader, kept_bytes: int) -> None:
        self.label, self.table = label, table
        self._loader, self._kept_bytes = loader, kept_bytes
        self._kept: list[Batch] | None = None
        self.passes = 0  # that were complete

    def batches(self, feed: Feed) -> Iterator[Batch]:
        """The batches of one pass. Call on all ranks. Raises DataFault as `Feed.one_pass`."""
        if self._kept is not None:
            yield from self._kept
            self.passes += 1
            return
        kept: list[Batch] = []
        size = 0
        for batch in feed.one_pass(self._loader):
            # Not of borders, whose number can differ from rank to rank.
            tensors = (batch.tokens, batch.labels, batch.positions)
            size += sum(tensor.nbytes for tensor in tensors if tensor is not None)
            if size > self._kept_bytes:
                kept.clear()
            else:
                kept.append(replace(batch, documents=(), skipped=()))
            yield batch
        self.passes += 1
        if size <= self._kept_bytes:
            self._kept = kept
            self.close()

    def close(self) -> None:
        """End the threads that read."""
        self._loader.close()


def held_out_sets(named: Sequence[tuple[str | None, str]], loaders: Sequence[Loader]) -> tuple[HeldOutSet, ...]:
    """The sets of these labels and tables."""
    kept_bytes = KEPT_BYTES // len(named)
    return tuple(HeldOutSet(*names, loader, kept_bytes) for names, loader in zip(named, loaders, strict=True))


@dataclass(frozen=True)
class SetLoss:
    """`loss`: the mean cross-entropy of a set over all ranks, in nats per token. `tokens`, `windows`: those in it."""

    loss: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Validator:
    """Computes the loss of each set, weighted by tokens. All validations of a run use the same windows.

    `windows`: the number of windows of each set at which a pass ends; None: the end of the set. `asked`: whether the
    configuration sets it.
    """

    sets: tuple[HeldOutSet, ...]
    feed: Feed
    forward: ForwardBackward
    device: torch.device
    freq: int
    windows: int | None
    asked: bool

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.freq == 0

    @torch.no_grad()
    def mean_loss(self, held_out: HeldOutSet, parts: tuple[torch.nn.Module, ...], mesh: Mesh) -> SetLoss:
        """The loss of one set. Sums over tokens are added in float64, so that their order does not show.

        Raises:
            DataFault: on all ranks, if one cannot read the data; the parts are then unchanged.
            UserError: the data have no token that counts.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.device)  # (nats, tokens, windows), read once
        for part in parts:
            part.eval()
        try:
            for batch in held_out.batches(self.feed):
                counted = batch.labels != IGNORE
                total[0] += self.forward.evaluate(batch)
                total[1] += counted.sum()
                total[2] += counted.any(1).sum()
        finally:
            for part in parts:
                free_gathered_parameters(part)
                part.train()
        nats, tokens, windows = mesh.reduce_sum(total).tolist()
        if tokens == 0:  # on all ranks
            what = "its data contain no window of validation.seq_len tokens"
            fix = "use more text, or reduce validation.seq_len"
            raise UserError(Problem(f"{held_out.table}.dataset", what, fix=fix))
        # Ranks that share rows count all tokens of these rows each, but only the nats of their own part.
        readers = mesh.loss_group.size() / mesh.batch_degree
        return SetLoss(nats * readers / tokens, round(tokens / readers), round(windows / readers))

    def rest_notice(self, held_out: HeldOutSet, found: SetLoss) -> str | None:
        """After the first validation of a set: that it may go on, if only the default ended the pass."""
        if self.asked or held_out.passes > 1 or found.windows != self.windows:
            return None
        name = "" if held_out.label is None else f" {held_out.label}"
        return (
            f"validation{name}: only the first {self.windows} windows are read, by default; validation.windows = -1 "
            "reads all"
        )

    def close(self) -> None:
        """End the threads that read."""
        for each in self.sets:
            each.close()


@dataclass
class ValidationCost:
    """Finds the first validation of a start that takes more than LARGE_SHARE of the time since the one before."""

    _last_end: float | None = field(default=None, init=False)
    _found: bool = field(default=False, init=False)

    def check(self, start: float, end: float) -> tuple[float, float] | None:
        """The seconds of a validation, and those between it and the one before, if the share is large and none was
        found yet. `start`, `end`: of the validation, in seconds."""
        seconds, between = end - start, None if self._last_end is None else start - self._last_end
        self._last_end = end
        if self._found or between is None or seconds <= LARGE_SHARE * between:
            return None
        self._found = True
        return seconds, between
