"""The learning rate as a pure function of the step.

Steps are counted from 1, as in log files. W is the number of warm-up steps, T the length of the schedule, D the number
of decay steps. The default (`lr_scheduler.variant = "torchtitan"`) equals torchtitan v0.2.2 to the last digit. The
factor of the peak learning rate is:

    step s = 1 .. W        s / W                 warm-up: 1/W of the peak in the first step, the peak in step W
    s = W+1 .. T-D         1                     the plateau
    s = T-D+1 .. T         floor + (1 - floor) * shape((s - 1 - (T - D)) / D)
    s > T                  floor; 1 if D = 0     the run is longer than its schedule, and the rate is constant

The first decay step is still at the peak, and the floor would be reached at step T+1, so no step of the schedule has a
learning rate of zero. A warm-up longer than the schedule is shortened to it. After step T+1, torchtitan v0.2.2
continues the formula, to negative rates (linear, sqrt) or up again (cosine), and fails if D = 0. Quadriga keeps the
rate constant instead, and the configuration check reports this before the run.

`lr_scheduler.variant = "early_decay"` is the former schedule of Quadriga. It differs in three points:

    W > T                  s / W                 the warm-up is cut off, not shortened
    s = T-D+1 .. T         floor + (1 - floor) * shape((s - (T - D)) / (D + 1))
    s > T                  floor, also if D = 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR

from quadriga.config.schema import LrScheduler

# Each decreases from 1 to 0 as its argument goes from 0 to 1. `sqrt` is the 1 - sqrt cooldown of arXiv 2405.18392.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, section: LrScheduler, steps: int) -> float:
    """The factor of the peak learning rate at `step` (from 1) of a run of `steps` steps."""
    if section.variant == "early_decay":
        return _early_decay_factor(step, section, steps)
    phases = section.phases(steps)
    if step <= phases.warmup:
        return step / phases.warmup
    decayed = min(step - 1, phases.total) - (phases.total - phases.decay)  # decay steps before this one
    if decayed < 0 or phases.decay == 0:
        return 1.0
    return _between_peak_and_floor(decayed / phases.decay, section)


def _early_decay_factor(step: int, section: LrScheduler, steps: int) -> float:
    phases = section.phases(steps)
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
    """Sets the learning rate of every parameter group. Before its n-th `step()`, the optimizer has the n-th rate."""
    return LambdaLR(optimizer, lambda done: lr_factor(done + 1, section, steps))


def fast_forward(schedule: LambdaLR, done: int) -> None:
    """Moves the schedule to the position after `done` steps, for a resume. This is enough, because the factor is a pure
    function of the step.

    The rates follow the current configuration of the schedule, not that of the checkpoint.
    """
    schedule.last_epoch = done
    rates = [base * factor(done) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # returned by get_last_lr()
