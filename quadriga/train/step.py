"""One optimizer step, from the batch to the new weights. The model is whole, or the rank has pipeline stages of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from quadriga.comm.mesh import Mesh
from quadriga.data.loader import Batch
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.optim.clip import gradient_norms, gradients_of
from quadriga.optim.optimizer import clip_gradients
from quadriga.parallel.data_parallel import set_gradient_sync
from quadriga.parallel.pipeline_parallel import Pipeline
from quadriga.train.loss import Loss, all_reduce_loss
from quadriga.train.state import TrainState

T = TypeVar("T")
LossContext = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepConfig:
    """The settings that all steps of a run share.

    Losses and gradients are sums: each micro-batch of each rank contributes the sum over its tokens divided by
    `tokens_per_step`, the number of tokens of a step over all ranks.
    """

    forward_backward: ForwardBackward
    device: torch.device
    micro_batch_rows: int
    tokens_per_step: int
    max_norm: float
    reduce_gradients: str  # once | every_micro_batch


def train_step(state: TrainState, step_config: StepConfig, mesh: Mesh) -> StepMetrics:
    """Take the next batch and train on it. The metrics stay on the device, so that the host does not wait.

    Raises DataFault on all ranks if one of them had no batch; the state is then that of the step before."""
    progress = state.progress
    progress.enter_phase("data", state.step + 1)
    with record_function("quadriga:data_wait"):
        batch = state.feed.next(state.loader)
    progress.enter_phase("forward and backward")
    lr = float(state.schedule.get_last_lr()[0])
    loss = torch.zeros((), dtype=torch.float64, device=step_config.device)  # the order of the sum must not show
    for micro_batch, is_last in with_last(batch.micro_batches(step_config.micro_batch_rows)):
        reduce = step_config.reduce_gradients == "every_micro_batch"
        loss += step_config.forward_backward.train(micro_batch, reduce=reduce, last=is_last)
        progress.tick()
    state.feed.check(state.loader)  # before the first change of what a checkpoint holds
    progress.enter_phase("gradient norm")
    gradients = gradients_of(state.parameters())
    norms = gradient_norms(gradients, mesh.sum_over_stages)
    local_bad_records = 0 if batch.bad_records is not None and not mesh.reads_rows else batch.bad_records
    totals = all_reduce_loss(loss, norms.total, mesh, local_bad_records)
    clip_gradients(state.optimizer, gradients, totals.grad_norm, step_config.max_norm)
    progress.enter_phase("optimizer")
    state.health.skip_if_bad(state.optimizer, loss, norms, totals.loss, totals.finite)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    state.step += 1
    state.tokens_seen += step_config.tokens_per_step
    return StepMetrics(
        step=state.step,
        loss=totals.loss,
        max_loss=totals.max_loss,
        grad_norm=totals.grad_norm,
        lr=lr,
        tokens_seen=state.tokens_seen,
        data_wait=state.loader.waited,
        skipped=state.health.skipped,
        verdict=state.health.verdict,
        documents=batch.documents,
        skipped_records=batch.skipped,
        bad_records=totals.bad_records,
        sources=batch.sources,
    )


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True


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
