"""One optimizer step, from the batch to the new weights. The model is whole, or the rank has pipeline stages of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from quadriga.comm.mesh import Mesh
from quadriga.data.loader import IGNORE, Batch
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.optim.clip import gradient_norms, gradients_of
from quadriga.optim.optimizer import clip_gradients
from quadriga.parallel.data_parallel import set_gradient_sync
from quadriga.parallel.pipeline_parallel import LocalBatch, Pipeline
from quadriga.train.loss import Divisor, LocalWork, Loss, all_reduce_loss
from quadriga.train.state import TrainState

T = TypeVar("T")
LossContext = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepConfig:
    """The settings that all steps of a run share.

    Losses and gradients are sums: each micro-batch of each rank contributes the sum over its tokens divided by
    `divisor`, the number of labels of a step over all ranks that count: `tokens_per_step`, or what the ranks count in
    each step, if it differs (`Batch.tokens_read`).
    """

    forward_backward: ForwardBackward
    device: torch.device
    micro_batch_rows: int
    tokens_per_step: int
    max_norm: float
    reduce_gradients: str  # once | every_micro_batch
    divisor: Divisor


def train_step(state: TrainState, step_config: StepConfig, mesh: Mesh) -> StepMetrics:
    """Take the next batch and train on it. The metrics stay on the device, so that the host does not wait.

    Raises DataFault on all ranks if one of them had no batch; the state is then that of the step before."""
    progress = state.progress
    progress.enter_phase("data", state.step + 1)
    with record_function("quadriga:data_wait"):
        batch = state.feed.next(state.loader)
    progress.enter_phase("forward and backward")
    work, tokens = None, step_config.tokens_per_step
    if batch.tokens_read is not None:
        labels, tokens = state.feed.labels_and_tokens()
        step_config.divisor.value = max(labels, 1)
        work = step_config.forward_backward.shard.work_of(batch, step_config.divisor.value)
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
    totals = all_reduce_loss(loss, norms.total, mesh, local_bad_records, work)
    clip_gradients(state.optimizer, gradients, totals.grad_norm, step_config.max_norm)
    progress.enter_phase("optimizer")
    state.health.skip_if_bad(state.optimizer, loss, norms, totals.loss, totals.finite)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    state.step += 1
    state.tokens_seen += tokens
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
        attention=totals.attention,
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

    @property
    def shard(self) -> LocalShard: ...

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

    def select(self, batch: Batch) -> LocalBatch:
        """The rank's part of these rows, on the device."""
        tokens, labels = self._local(batch.tokens), self._local(batch.labels)
        if batch.positions is None or batch.borders is None:
            return LocalBatch(tokens, labels, self.positions)
        borders = batch.borders.to(self.device, non_blocking=True)
        return LocalBatch(tokens, labels, self._local(batch.positions), borders)

    def work_of(self, batch: Batch, counted: int) -> LocalWork:
        """The rank's part of the work of a step, of which `counted` labels count over all ranks."""
        here = self._on_host
        share = int((batch.labels[:, here] != IGNORE).sum()) / counted
        places = here.expand(len(batch.labels), -1) if batch.positions is None else batch.positions[:, here]
        return LocalWork(share, int((places + 1).sum()))  # a token sees its document up to itself

    def _local(self, of_rows: Tensor) -> Tensor:
        on_device = of_rows.to(self.device, non_blocking=True)
        return on_device if len(self.positions) == self.seq_len else on_device[:, self.positions]

    @cached_property
    def _on_host(self) -> Tensor:
        return self.positions.cpu()


@dataclass(frozen=True)
class WholeForwardBackward:
    """The rank holds the whole model. `loss` is a function of its output and the labels."""

    model: nn.Module
    loss: Loss
    loss_context: LossContext
    shard: LocalShard

    def train(self, batch: Batch, *, reduce: bool, last: bool) -> Tensor:
        inputs = self.shard.select(batch)
        set_gradient_sync(self.model, reduce, last)
        with self.loss_context():
            loss = self._loss_of(inputs)
            loss.backward()
        return loss.detach()

    def evaluate(self, batch: Batch) -> Tensor:
        inputs = self.shard.select(batch)
        with self.loss_context():
            return self._loss_of(inputs).detach()

    def _loss_of(self, inputs: LocalBatch) -> Tensor:
        return self.loss(self.model(inputs.tokens, inputs.positions, inputs.borders), inputs.labels)


@dataclass(frozen=True)
class PipelineForwardBackward:
    """The rank holds some stages of the model."""

    pipeline: Pipeline
    loss_context: LossContext
    shard: LocalShard

    def train(self, batch: Batch, *, reduce: bool, last: bool) -> Tensor:
        inputs = self.shard.select(batch)
        with self.loss_context():
            return self.pipeline.train(inputs, reduce=reduce, last=last)

    def evaluate(self, batch: Batch) -> Tensor:
        inputs = self.shard.select(batch)
        with self.loss_context():
            return self.pipeline.evaluate(inputs)
