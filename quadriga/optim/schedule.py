"""The learning rate over time, as a pure function of the step.

Steps count from 1, as people and log files do. With W warm-up steps, a schedule of T steps and D decay steps, the
default (`lr_scheduler.variant = "torchtitan"`) is that of torchtitan v0.2.2, equal to the last digit:

    step s = 1 .. W        s / W                 the first step moves by 1/W of the peak, step W by all of it
    s = W+1 .. T-D         1                     the plateau
    s = T-D+1 .. T         floor + (1 - floor) * shape((s - 1 - (T - D)) / D)
    s > T                  floor; 1 if D = 0     the run outlives its schedule, and the rate stays where it ends

The first decay step is still at the peak, and the floor would be reached at step T+1: no step of the schedule is spent
at a learning rate of zero. A warm-up longer than the schedule is shortened to it. Beyond step T+1 torchtitan v0.2.2
continues the formula, to negative rates (linear, sqrt) or up again (cosine), and fails where D = 0: the rate is held
here instead, and the configuration check says so before the run.

`lr_scheduler.variant = "early_decay"` is the schedule that Quadriga had before. It differs in three points:

    W > T                  s / W                 the warm-up is cut off, not shortened
    s = T-D+1 .. T         floor + (1 - floor) * shape((s - (T - D)) / (D + 1))
    s > T                  floor, also if D = 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR

from quadriga.config.lr_phases import lr_phases
from quadriga.config.schema import LrScheduler

# From 1 to 0 as the argument goes from 0 to 1. `sqrt` is the 1 - sqrt cooldown of arXiv 2405.18392.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, section: LrScheduler, steps: int) -> float:
    """The share of the peak learning rate at `step` (from 1) of a run of `steps`."""
    if section.variant == "early_decay":
        return _early_decay_factor(step, section, steps)
    phases = lr_phases(section, steps)
    if step <= phases.warmup:
        return step / phases.warmup
    decayed = min(step - 1, phases.total) - (phases.total - phases.decay)  # decay steps before this one
    if decayed < 0 or phases.decay == 0:
        return 1.0
    return _between_peak_and_floor(decayed / phases.decay, section)


def _early_decay_factor(step: int, section: LrScheduler, steps: int) -> float:
    phases = lr_phases(section, steps)
    if step <= section.warmup_steps:
        return step / section.warmup_steps
    if step > phases.total:
        return section.min_lr_factor
    decayed = step - (phases.total - phases.decay)
    if decayed <= 0:
        return 1.0
    return _between_peak_and_floor(decayed / (phases.decay + 1), section)


def _between_peak_and_floor(progress: float, section: LrScheduler) -> float:
    return section.min_lr_factor + (1.0 - section.min_lr_factor) * SHAPES[section.decay_type](progress)


def build_schedule(optimizer: torch.optim.Optimizer, section: LrScheduler, steps: int) -> LambdaLR:
    """Drives the learning rate of every group. Before its n-th `step()` the optimizer stands at step n's rate."""
    return LambdaLR(optimizer, lambda done: lr_factor(done + 1, section, steps))


def fast_forward(schedule: LambdaLR, done: int) -> None:
    """Put the schedule where `done` steps have been taken: what a resume needs, since the factor is a pure function.

    The rates follow the schedule as it is configured now, not as it was when a checkpoint was saved.
    """
    schedule.last_epoch = done
    rates = [base * factor(done) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # what get_last_lr() says
