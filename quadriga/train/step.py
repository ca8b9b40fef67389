"""One optimizer step, from the batch to the new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from quadriga.comm.mesh import Mesh
from quadriga.data.batch import IGNORE, Batch
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.optim.clip import clip_gradients
from quadriga.parallel.data_parallel import set_gradient_sync
from quadriga.train.state import TrainState

T = TypeVar("T")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What every step of a run has in common.

    Losses and gradients are parts that add up: each micro-batch of each rank contributes the sum over its tokens
    divided by `tokens_per_step`, the tokens of the whole run's step.
    """

    loss: Loss
    device: torch.device
    micro_batch_rows: int
    tokens_per_step: int
    max_norm: float
    reduce_gradients: str  # once | every_micro_batch


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy in nats summed over tokens, in float32.

    Args:
        logits: (batch, seq, vocab), any float dtype.
        labels: (batch, seq) int64; `IGNORE` is not counted.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def train_step(state: TrainState, recipe: Recipe, mesh: Mesh) -> StepMetrics:
    """Take the next batch, train on it, and leave the step's numbers on the device."""
    batch = state.loader.next()
    lr = float(state.schedule.get_last_lr()[0])
    loss = torch.zeros((), device=recipe.device)
    for micro_batch, is_last in with_last(batch.micro_batches(recipe.micro_batch_rows)):
        set_gradient_sync(state.model, reduce=recipe.reduce_gradients == "every_micro_batch", last=is_last)
        loss += forward_backward(state.model, recipe, micro_batch)
    grad_norm = clip_gradients(state.model.parameters(), recipe.max_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    state.step += 1
    state.tokens_seen += recipe.tokens_per_step
    return StepMetrics(
        step=state.step,
        loss=mesh.reduce_sum(loss),
        grad_norm=grad_norm,
        lr=lr,
        tokens_seen=state.tokens_seen,
        data_wait=state.loader.waited,
    )


def forward_backward(model: torch.nn.Module, recipe: Recipe, batch: Batch) -> torch.Tensor:
    """Accumulate the gradients of one micro-batch; returns its part of the loss, detached."""
    tokens = batch.tokens.to(recipe.device, non_blocking=True)
    labels = batch.labels.to(recipe.device, non_blocking=True)
    loss = recipe.loss(model(tokens), labels) / recipe.tokens_per_step
    loss.backward()
    return loss.detach()


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True
