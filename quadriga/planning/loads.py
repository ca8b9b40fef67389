"""What lies on a pipeline's rank beside a pass: how many others it keeps, and whose gradients are there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from quadriga.config.pipeline_order import Order


@dataclass(frozen=True)
class Load:
    """An action, and what is there beside it, by each stage of its rank (as `stages` of `loads_of` has them).

    `passes`: forward passes not gone back yet, that of the action included. `halves`: of those, how many have their
    gradients of inputs and wait for those of weights. `fed`: how many passes have gradients of inputs from a backward
    pass in two parts. `begun`: whether a backward pass has made gradients of weights.
    """

    stage: int
    kind: str
    passes: tuple[int, ...]
    halves: tuple[int, ...]
    fed: tuple[int, ...]
    begun: tuple[bool, ...]

    def covers(self, other: Load) -> bool:
        """Whether nothing is less here than there."""
        mine, its = ((*load.passes, *load.halves, *load.fed, *load.begun) for load in (self, other))
        return all(one >= another for one, another in zip(mine, its, strict=True))


@lru_cache(maxsize=4096)
def loads_of(order: Order, rank: int, again: bool = False) -> tuple[Load, ...]:
    """The loads of a rank that no other one covers: by stage and kind, before and after the stage's first gradients.

    `again`: the order is gone through several times before the update.
    """
    stages = sorted({stage for stage, _ in order.counts[rank]})
    passes, halves, fed = Counter[int](), Counter[int](), Counter[int]()
    begun: set[int] = set()
    found: dict[tuple[int, str, bool], list[Load]] = {}
    for stage, kind, _ in order.ranks[rank]:
        if kind == "F":
            passes[stage] += 1
        elif kind == "W":
            halves[stage] -= 1
        load = Load(
            stage,
            kind,
            passes=tuple(passes[each] for each in stages),
            halves=tuple(halves[each] for each in stages),
            fed=tuple(fed[each] for each in stages),
            begun=tuple(each in begun for each in stages),
        )
        alike = found.setdefault((stage, kind, stage in begun), [])
        if not any(other.covers(load) for other in alike):
            alike[:] = [other for other in alike if not load.covers(other)] + [load]
        if kind in "BW":
            passes[stage] -= 1
            begun.add(stage)
        elif kind == "I":
            halves[stage] += 1
            fed[stage] += 1
    once = tuple(load for alike in found.values() for load in alike)
    return (*once, *(replace(load, begun=(True,) * len(stages)) for load in once)) if again else once
