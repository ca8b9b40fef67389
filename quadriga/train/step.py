"""One optimizer step, from the batch to the new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from quadriga.comm.mesh import Mesh
from quadriga.data.batch import IGNORE
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.optim.clip import clip_gradients
from quadriga.train.passes import Pass
from quadriga.train.state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """What every step of a run has in common.

    Losses and gradients are parts that add up: each micro-batch of each rank contributes the sum over its tokens
    divided by `tokens_per_step`, the tokens of the whole run's step.
    """

    forward_backward: Pass
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
    loss = torch.zeros((), dtype=torch.float64, device=recipe.device)  # whose sum does not depend on the order
    for micro_batch, is_last in with_last(batch.micro_batches(recipe.micro_batch_rows)):
        reduce = recipe.reduce_gradients == "every_micro_batch"
        loss += recipe.forward_backward.train(micro_batch, reduce=reduce, last=is_last)
    grad_norm = clip_gradients(state.parameters(), recipe.max_norm, mesh.sum_over_stages)
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


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True
