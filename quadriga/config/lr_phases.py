"""The number of steps of warm-up, plateau and decay in a learning-rate schedule.

Used by the schedule itself (`quadriga.optim.schedule`), the rules about it, and the cards.
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.config.schema import LrScheduler


@dataclass(frozen=True)
class Phases:
    """Phases in optimizer steps: `total = warmup + plateau + decay`. `wanted_decay` is the decay that `decay_ratio`
    requests, which the warm-up can shorten."""

    total: int
    warmup: int
    plateau: int
    decay: int
    wanted_decay: int


def lr_phases(section: LrScheduler, steps: int) -> Phases:
    """The phases of the schedule of a run of `steps` optimizer steps.

    The warm-up comes first, and takes at most the whole schedule. A decay that does not fit after it is shortened.
    `decay_ratio * total` is rounded like Python's `round`, halves to even.
    """
    total = section.total_steps or steps
    warmup = min(section.warmup_steps, total)
    wanted = total - warmup if section.decay_ratio is None else round(total * section.decay_ratio)
    decay = min(wanted, total - warmup)
    return Phases(total, warmup, total - warmup - decay, decay, wanted)
