"""The learning rate over time, as a pure function of the step.

Steps count from 1, as people and log files do. With W warm-up steps, a horizon of T steps and D decay steps:

    step s = 1 .. W        s / W                 the first step moves by 1/W of the peak, step W by all of it
    s = W+1 .. T-D         1                     the plateau
    s = T-D+1 .. T         floor + (1 - floor) * shape((s - (T - D)) / (D + 1))
    s > T                  floor                 the run outlives its schedule

The decay would reach its floor at step T+1: no step of the run is spent at a learning rate of zero. A warm-up longer
than the run is cut off, not rescaled: the ramp's slope is what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR

from quadriga.config.schema import LrScheduler

# From 1 to 0 as the argument goes from 0 to 1. `sqrt` is the 1 - sqrt cooldown of arXiv 2405.18392.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, section: LrScheduler, steps: int) -> float:
    """The share of the peak learning rate at `step` (from 1) of a run of `steps`."""
    horizon = section.total_steps or steps
    decay = decay_steps(section, horizon)
    if step <= section.warmup_steps:
        return step / section.warmup_steps
    if step <= horizon - decay:
        return 1.0
    if step > horizon:
        return section.min_lr_factor
    progress = (step - (horizon - decay)) / (decay + 1)
    return section.min_lr_factor + (1.0 - section.min_lr_factor) * SHAPES[section.decay_type](progress)


def decay_steps(section: LrScheduler, horizon: int) -> int:
    """How many of `horizon` steps decay: `decay_ratio` of them, or all after the warm-up; never part of the warm-up."""
    after_warmup = max(0, horizon - section.warmup_steps)
    if section.decay_ratio is None:
        return after_warmup
    return min(round(horizon * section.decay_ratio), after_warmup)


def build_schedule(optimizer: torch.optim.Optimizer, section: LrScheduler, steps: int) -> LambdaLR:
    """Drives the learning rate of every group. Before its n-th `step()` the optimizer stands at step n's rate."""
    return LambdaLR(optimizer, lambda done: lr_factor(done + 1, section, steps))


def wind_to(schedule: LambdaLR, done: int) -> None:
    """Put the schedule where `done` steps have been taken: what a resume needs, since the factor is a pure function.

    The rates follow the schedule as it is configured now, not as it was when a checkpoint was saved.
    """
    schedule.last_epoch = done
    rates = [base * factor(done) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # what get_last_lr() says
