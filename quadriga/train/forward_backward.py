"""Forward and backward of a batch: through a whole model, or through a pipeline of its stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quadriga.data.batch import Batch
from quadriga.parallel.data_parallel import set_gradient_sync
from quadriga.parallel.pipeline_parallel import Pipeline

Loss = Callable[[Tensor, Tensor], Tensor]
LossContext = Callable[[], AbstractContextManager[None]]


class ForwardBackward(Protocol):
    """Both methods return this rank's part of the loss, detached, shape (). The parts add up over `Mesh.loss_group`."""

    def train(self, batch: Batch, *, reduce: bool, last: bool) -> Tensor:
        """Forward and backward; gradients are accumulated.

        `reduce` and `last`: see `parallel.data_parallel.set_gradient_sync`.
        """
        ...

    def evaluate(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of every sequence. `positions`: int64, shape (local tokens,), on the device."""

    device: torch.device
    positions: Tensor
    seq_len: int

    def select(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens and labels on the device, each of shape (rows, local tokens)."""
        tokens = batch.tokens.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        if len(self.positions) == self.seq_len:
            return tokens, labels
        return tokens[:, self.positions], labels[:, self.positions]


@dataclass(frozen=True)
class WholeForwardBackward:
    """The rank holds the whole model. `loss` is a function of its output and the labels."""

    model: nn.Module
    loss: Loss
    loss_context: LossContext
    shard: LocalShard

    def train(self, batch: Batch, *, reduce: bool, last: bool) -> Tensor:
        tokens, labels = self.shard.select(batch)
        set_gradient_sync(self.model, reduce, last)
        with self.loss_context():
            loss = self.loss(self.model(tokens, self.shard.positions), labels)
            loss.backward()
        return loss.detach()

    def evaluate(self, batch: Batch) -> Tensor:
        tokens, labels = self.shard.select(batch)
        with self.loss_context():
            return self.loss(self.model(tokens, self.shard.positions), labels).detach()


@dataclass(frozen=True)
class PipelineForwardBackward:
    """The rank holds some stages of the model."""

    pipeline: Pipeline
    loss_context: LossContext
    shard: LocalShard

    def train(self, batch: Batch, *, reduce: bool, last: bool) -> Tensor:
        tokens, labels = self.shard.select(batch)
        with self.loss_context():
            return self.pipeline.train(tokens, labels, self.shard.positions, reduce=reduce, last=last)

    def evaluate(self, batch: Batch) -> Tensor:
        tokens, labels = self.shard.select(batch)
        with self.loss_context():
            return self.pipeline.evaluate(tokens, labels, self.shard.positions)
