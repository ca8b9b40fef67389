"""How many steps of a learning-rate schedule belong to the warm-up, the plateau and the decay.

Shared by the schedule itself (`quadriga.optim.schedule`), the rules that speak of it and the cards that describe it.
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.config.schema import LrScheduler


@dataclass(frozen=True)
class Phases:
    """`warmup + plateau + decay` is `total`, the length of the schedule in optimizer steps; `wanted_decay` is what
    `decay_ratio` asks for, before the warm-up takes its part."""

    total: int
    warmup: int
    plateau: int
    decay: int
    wanted_decay: int


def lr_phases(section: LrScheduler, steps: int) -> Phases:
    """The phases of the schedule of a run of `steps`.

    The warm-up comes first: one that is longer than the schedule takes all of it, and a decay that does not fit behind
    it is shortened. `decay_ratio` is rounded as Python's `round` does, halves to even.
    """
    total = section.total_steps or steps
    warmup = min(section.warmup_steps, total)
    wanted = total - warmup if section.decay_ratio is None else round(total * section.decay_ratio)
    decay = min(wanted, total - warmup)
    return Phases(total, warmup, total - warmup - decay, decay, wanted)
