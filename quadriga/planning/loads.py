"""Activations and gradients in the memory of a pipeline rank besides the pass that runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from quadriga.config.pipeline_order import PipelineOrder


@dataclass(frozen=True)
class Load:
    """An action, and what else is in memory during it, by stage of its rank (in the order of stage numbers).

    `passes`: micro-batches whose activations are held, with that of the action. `n_pending_wgrad`: how many of them
    have gradients of inputs and not yet of weights. `n_bwd_input`: passes whose gradients of inputs were computed
    separately, in a split backward pass. `has_weight_grads`: whether gradients of the weights exist.
    """

    stage: int
    kind: str
    passes: tuple[int, ...]
    n_pending_wgrad: tuple[int, ...]
    n_bwd_input: tuple[int, ...]
    has_weight_grads: tuple[bool, ...]

    def dominates(self, other: Load) -> bool:
        """Whether no count is smaller than that of `other`."""
        own, others = (
            (*load.passes, *load.n_pending_wgrad, *load.n_bwd_input, *load.has_weight_grads) for load in (self, other)
        )
        return all(one >= another for one, another in zip(own, others, strict=True))


@lru_cache(maxsize=4096)
def loads_of(order: PipelineOrder, rank: int, accumulates: bool = False) -> tuple[Load, ...]:
    """The loads of a rank that no other load dominates, by stage and kind, before and after the stage has gradients.

    `accumulates`: the order runs several times before the update. From the second on, all stages have gradients.
    """
    stages = sorted({stage for stage, _ in order.counts[rank]})
    passes, n_pending_wgrad, n_bwd_input = Counter[int](), Counter[int](), Counter[int]()
    has_weight_grads: set[int] = set()
    found: dict[tuple[int, str, bool], list[Load]] = {}
    for stage, kind, _ in order.ranks[rank]:
        if kind == "F":
            passes[stage] += 1
        elif kind == "W":
            n_pending_wgrad[stage] -= 1
        load = Load(
            stage,
            kind,
            passes=tuple(passes[each] for each in stages),
            n_pending_wgrad=tuple(n_pending_wgrad[each] for each in stages),
            n_bwd_input=tuple(n_bwd_input[each] for each in stages),
            has_weight_grads=tuple(each in has_weight_grads for each in stages),
        )
        undominated = found.setdefault((stage, kind, stage in has_weight_grads), [])
        if not any(other.dominates(load) for other in undominated):
            undominated[:] = [other for other in undominated if not load.dominates(other)] + [load]
        if kind in "BW":
            passes[stage] -= 1
            has_weight_grads.add(stage)
        elif kind == "I":
            n_pending_wgrad[stage] += 1
            n_bwd_input[stage] += 1
    once = tuple(load for undominated in found.values() for load in undominated)
    return (*once, *(replace(load, has_weight_grads=(True,) * len(stages)) for load in once)) if accumulates else once
