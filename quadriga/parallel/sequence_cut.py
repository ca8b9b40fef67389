"""Splits a sequence over the ranks of context parallelism, and restores its order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceCut:
    """The part of every sequence on `rank` of `size` ranks: 1 chunk, or 2 (`headtail`), an early and a late one.

    With causal attention a late chunk attends to more keys than an early one. Of 2 x size chunks, rank r holds number r
    and number 2 x size - 1 - r, so that all ranks have the same work. With one chunk each, the last rank has
    2 x size - 1 times the work of the first.
    """

    rank: int
    size: int
    chunks: int

    def starts(self, length: int) -> list[int]:
        """The first positions of this rank's chunks in the whole sequence; the rank holds `length` tokens in total."""
        if self.chunks == 1:
            return [self.rank * length]
        half = length // 2
        return [self.rank * half, (2 * self.size - 1 - self.rank) * half]

    def positions(self, length: int) -> Tensor:
        """The positions of the rank's `length` tokens in the whole sequence: int64, shape (length,)."""
        each = length // self.chunks
        return torch.cat([torch.arange(start, start + each) for start in self.starts(length)])

    def to_sequence_order(self, x: Tensor) -> Tensor:
        """Reorder dimension 0 from the ranks' parts, concatenated by rank, to the natural order of the sequence."""
        if self.chunks == 1:
            return x
        early, late = x.unflatten(0, (self.size, 2, -1)).unbind(1)
        return torch.cat((early, late.flip(0))).flatten(0, 1)

    def to_rank_order(self, x: Tensor) -> Tensor:
        """The inverse of `to_sequence_order`."""
        if self.chunks == 1:
            return x
        early, late = x.unflatten(0, (2, self.size, -1))
        return torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)
