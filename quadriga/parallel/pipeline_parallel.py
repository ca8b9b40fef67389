"""Pipeline parallelism."""

from __future__ import annotations

from torch import Tensor


class Pipeline:
    def train(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, reduce: bool, last: bool) -> Tensor:
        raise NotImplementedError

    def evaluate(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError
