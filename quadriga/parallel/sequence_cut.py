"""How a sequence is assigned to the ranks that share it, and put together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceCut:
    """What `rank` of `size` ranks holds of every sequence: 1 chunk, or 2 (`headtail`), an early and a late one.

    With causal attention a late chunk has more to look at than an early one. Of 2 x size chunks rank r holds number r
    and number 2 x size - 1 - r, so that all ranks have equally much to do. In one chunk each, the last rank has
    2 x size - 1 times as much to do as the first.
    """

    rank: int
    size: int
    chunks: int

    def starts(self, length: int) -> list[int]:
        """Where in the whole sequence the chunks begin, of which this rank holds `length` tokens together."""
        if self.chunks == 1:
            return [self.rank * length]
        half = length // 2
        return [self.rank * half, (2 * self.size - 1 - self.rank) * half]

    def positions(self, length: int) -> Tensor:
        """Where in the whole sequence the rank's `length` tokens stand: int64 (length,)."""
        each = length // self.chunks
        return torch.cat([torch.arange(start, start + each) for start in self.starts(length)])

    def to_sequence_order(self, x: Tensor) -> Tensor:
        """Along dimension 0: what the ranks hold, one rank after the other -> the sequence in its natural order."""
        if self.chunks == 1:
            return x
        early, late = x.unflatten(0, (self.size, 2, -1)).unbind(1)
        return torch.cat((early, late.flip(0))).flatten(0, 1)

    def to_rank_order(self, x: Tensor) -> Tensor:
        """The reverse of `to_sequence_order`."""
        if self.chunks == 1:
            return x
        early, late = x.unflatten(0, (2, self.size, -1))
        return torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)
