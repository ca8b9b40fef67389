"""Numbers that go wrong on purpose, in the real trainer: for tests of what is done about them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class InjectedFault:
    """At `step`, on `rank`, losses are multiplied by `loss`, and their gradients by `loss` and `gradient`. After it the
    lowest bit of one number of the parameter named `flip_bit_of` is turned over, as a cosmic ray would; or the
    rank is killed.
    """

    step: int
    rank: int = 0
    loss: float = 1.0
    gradient: float = 1.0
    flip_bit_of: str | None = None
    kill: bool = False


class _ScaleLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: float, gradient: float) -> Tensor:
        ctx.factor = loss * gradient
        return value * loss

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return given * ctx.factor, None, None


def flip_lowest_bit(parameter: Tensor, place: int = 0) -> None:
    """Turn over the lowest bit of one float32 number of this rank's shard."""
    _local(parameter).view(torch.int32).flatten()[place] ^= 1


def far_from_a_power_of_two(parameter: Tensor) -> int:
    """Where a lowest bit outlives updates: a number that grows past a power of two is rounded to one bit less."""
    mantissa, exponent = torch.frexp(_local(parameter).flatten().abs())
    return int(torch.ldexp(torch.minimum(mantissa - 0.5, 1 - mantissa), exponent).argmax())


def _local(parameter: Tensor) -> Tensor:
    local = parameter.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def inject(*faults: InjectedFault) -> None:
    """Inject faults into this process, a rank: its losses are multiplied in the steps named. Call it before
    the trainer is built."""
    from quadriga.train import loop, loss, step

    rank, cross_entropy, train_step = int(os.environ["RANK"]), loss.summed_cross_entropy, step.train_step
    by_step = {injected.step: injected for injected in faults if injected.rank == rank}
    now = 0

    def cross_entropy_with_faults(logits: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(logits, labels)
        injected = by_step.get(now)
        return value if injected is None else _ScaleLoss.apply(value, injected.loss, injected.gradient)

    def counting_train_step(state: Any, step_config: Any, mesh: Any) -> Any:
        nonlocal now
        now = state.step + 1
        metrics = train_step(state, step_config, mesh)
        if now in by_step and by_step[now].kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if now in by_step and (name := by_step[now].flip_bit_of):
            parameter = dict(pair for part in state.parts for pair in part.named_parameters())[name]
            flip_lowest_bit(parameter, far_from_a_power_of_two(parameter))
        return metrics

    loss.summed_cross_entropy = cross_entropy_with_faults
    step.train_step = loop.train_step = counting_train_step
