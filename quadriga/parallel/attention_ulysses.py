"""Context parallelism by exchanging parts of the sequence for parts of the heads (Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.parallel.sequence_cut import SequenceCut

c10d = torch.ops._c10d_functional


class UlyssesAttention(nn.Module):
    """Exchanges all heads of a part of the sequence for some heads of the whole sequence, then calls `core` unchanged.

    Both numbers of heads must be divisible by the number of ranks.
    """

    def __init__(self, core: nn.Module, cut: SequenceCut, group_name: str) -> None:
        super().__init__()
        self.core, self.cut, self.group_name = core, cut, group_name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        size = self.cut.size
        heads = [x.shape[1] // size for x in (q, k, v)]
        # (batch, ranks, heads, part, head_dim), so that one exchange carries all three; then ranks and part go first.
        by_rank = torch.cat([x.unflatten(1, (size, -1)) for x in (q, k, v)], dim=2)
        whole = self.cut.to_sequence_order(self._exchanged(by_rank.permute(1, 3, 0, 2, 4)))
        attended = self.core(*whole.permute(1, 2, 0, 3).split(heads, dim=1), borders)
        by_rank = self.cut.to_rank_order(attended.permute(2, 0, 1, 3)).unflatten(0, (size, -1))
        return self._exchanged(by_rank).unflatten(0, (size, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        """All-to-all: (ranks, part, ...), one row per receiver -> (ranks * part, ...), one part per sender."""
        x = x.flatten(0, 1).contiguous()
        rows = [x.shape[0] // self.cut.size] * self.cut.size
        return c10d.wait_tensor(c10d.all_to_all_single(x, rows, rows, self.group_name))
