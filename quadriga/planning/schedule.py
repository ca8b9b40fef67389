"""The orders in which torch's pipeline schedules run their passes, and what a rank holds besides each pass.

Pure arithmetic; a test compares the orders with torch's.

GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B (arXiv:2104.04473), interleaved and V-shaped zero bubble
(arXiv:2401.10241), DualPipeV (arXiv:2412.19437).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise

from quadriga.config.pipeline_order import Action, PipelineOrder

UNSHARDED_AHEAD = 3  # stages whose parameters torch's pipelines keep gathered at once


@lru_cache(maxsize=1024)
def order_of(schedule: str, ranks: int, stages_a_rank: int, micro_batches: int) -> PipelineOrder:
    """The order of one of torch's schedules. `schedule`: its name in the configuration. Raises KeyError for others."""
    add_actions = {
        "GPipe": _all_forward_first,
        "LoopedBFS": _all_forward_first,
        "1F1B": _one_forward_one_backward,
        "Interleaved1F1B": _interleaved,
        "InterleavedZeroBubble": _interleaved,
        "ZBVZeroBubble": _v_with_zero_bubble,
        "DualPipeV": _dual_pipe,
    }[schedule]
    split = schedule == "InterleavedZeroBubble"
    rows = [_RankActions(rank, ranks, stages_a_rank, micro_batches, split) for rank in range(ranks)]
    for row in rows:
        add_actions(row)
    return PipelineOrder(tuple(tuple(row.actions) for row in rows))


@lru_cache(maxsize=4096)
def unsharded_stages(order: PipelineOrder, rank: int) -> tuple[frozenset[int], ...]:
    """The sets of stages of a rank with gathered parameters, in time order. With `fully_shard`, torch gathers the next
    `UNSHARDED_AHEAD` stages that the rank runs and frees the others."""
    actions, found = order.ranks[rank], list[frozenset[int]]()
    for place in range(len(actions)):
        wanted: set[int] = set()
        for action in islice(actions, place, None):
            wanted.add(action.stage)
            if len(wanted) == UNSHARDED_AHEAD:
                break
        if not found or found[-1] != wanted:
            found.append(frozenset(wanted))
    return tuple(found)


@lru_cache(maxsize=4096)
def gather_counts(order: PipelineOrder, rank: int) -> Mapping[int, int]:
    """How often the parameters of each stage of a rank are gathered."""
    seen = unsharded_stages(order, rank)
    return Counter(stage for before, now in pairwise((frozenset[int](), *seen)) for stage in now - before)


class _RankActions:
    """The actions of one rank. Each stage runs its micro-batches in order, so stage and kind determine the next one."""

    def __init__(self, rank: int, ranks: int, stages: int, micro_batches: int, split: bool) -> None:
        self.rank, self.ranks, self.stages, self.micro_batches, self.split = rank, ranks, stages, micro_batches, split
        self.after = ranks - 1 - rank
        self.first, self.second = rank, 2 * ranks - 1 - rank  # in a V
        self.actions: list[Action] = []
        self.pending_weight_grads: list[Action] = []  # actions W whose action I is done
        self._done: Counter[tuple[int, str]] = Counter()

    def add(self, stage: int, *kinds: str) -> None:
        """Add the next micro-batch of a stage. Ignored beyond the last: schedules may count more than there are."""
        for kind in kinds:
            each = self._done[stage, kind]
            self._done[stage, kind] += 1
            if each < self.micro_batches:
                self.actions.append(Action(stage, kind, each))
            if kind == "B":  # both parts at once
                self._done[stage, "I"] += 1
                self._done[stage, "W"] += 1
            elif kind == "I":
                self._done[stage, "B"] += 1
                self.pending_weight_grads.append(Action(stage, "W", each))

    def repeat(self, times: int, *turns: tuple[int, str]) -> None:
        """Add the kinds of each turn (stage, kinds), `times` times."""
        for _ in range(times):
            for stage, kinds in turns:
                self.add(stage, *kinds)

    def add_weight_grads(self, most: int = 1) -> None:
        """Add pending gradients of weights, the oldest first."""
        due, self.pending_weight_grads = self.pending_weight_grads[:most], self.pending_weight_grads[most:]
        for action in due:
            self.add(action.stage, "W")


def _all_forward_first(row: _RankActions) -> None:
    stages = range(row.rank, row.ranks * row.stages, row.ranks)
    for stage in stages:
        row.add(stage, *"F" * row.micro_batches)
    for stage in reversed(stages):
        # torch's breadth-first schedule starts the backward passes at the last micro-batch, its GPipe at the first.
        micro_batches = range(row.micro_batches)[:: -1 if row.stages > 1 else 1]
        row.actions += [Action(stage, "B", each) for each in micro_batches]


def _one_forward_one_backward(row: _RankActions) -> None:
    ahead = min(row.micro_batches, row.ranks - row.rank)
    row.add(row.rank, *"F" * ahead, *"BF" * (row.micro_batches - ahead), *"B" * ahead)


def _interleaved(row: _RankActions) -> None:
    """Each stage in turn runs a round of about as many micro-batches as ranks. With a split backward pass, gradients of
    weights are delayed by one step per earlier rank."""
    per_round = row.micro_batches // max(1, row.micro_batches // row.ranks)
    passes = row.stages * row.micro_batches
    ahead = min((row.stages - 1) * per_round + (1 if row.split else 2) * row.after, passes)

    def stage(step: int) -> int:
        return step // per_round % row.stages * row.ranks + row.rank

    for step in range(passes + ahead):
        if step < passes:
            row.add(stage(step), "F")
        if step >= ahead:
            back = row.stages - 1 - (step - ahead) // per_round % row.stages
            row.add(back * row.ranks + row.rank, "I" if row.split else "B")
            if row.split and step - ahead >= row.rank:
                row.add_weight_grads()
    row.add_weight_grads(len(row.pending_weight_grads))


def _v_with_zero_bubble(row: _RankActions) -> None:
    first, second = row.first, row.second
    counted = max(2 * row.ranks - 1, row.micro_batches)  # with fewer micro-batches, `add` ignores some actions
    row.repeat(2 * row.after + 1, (first, "F"))
    row.repeat(row.rank, (second, "F"), (first, "F"))
    row.repeat(row.after + 1, (second, "FIW"))
    forward = 2 * row.after + 1 + row.rank
    for step in range(counted - row.rank - row.after - 1):
        row.add(first, *("FIW" if forward + step < counted else "IW"))
        row.add(second, *"FIW")
    row.repeat(row.rank, (first, "I"), (second, "I"))
    row.repeat(row.after + 1, (first, "IW"))
    row.repeat(row.rank, (second, "W"))
    row.repeat(row.rank, (first, "W"))


def _dual_pipe(row: _RankActions) -> None:
    """Each rank has two stages: forward passes of one alternate with backward passes of the other."""
    first, second, odd = row.first, row.second, row.rank % 2
    row.repeat(2 * row.after, (first, "F"))
    row.repeat(row.rank + 1, (first, "F"), (second, "F"))
    for _ in range(row.after):
        row.add(second, "I")
        row.add_weight_grads()
        row.add(second, "F")
    row.repeat(row.micro_batches - 2 * row.ranks + row.rank + 1, (first, "F"), (second, "BF"), (first, "B"))
    row.repeat(row.after, (second, "BF"), (first, "B"))
    half = (row.rank + 1) // 2  # from here on split: W actions fill the idle time that follows
    for step in range(row.rank + 1):
        row.add(second, "I" if step > half - (odd == 1) else "B")
        row.add(first, "I" if step >= half else "B")
    is_split = bool(row.pending_weight_grads)
    for _ in range(row.after):
        row.add_weight_grads()
        row.add(first, "I" if is_split else "B")
    row.add_weight_grads(len(row.pending_weight_grads))


# --- what is in memory besides the pass that runs --------------------------------------------------------------------


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
        own, others = ((*x.passes, *x.n_pending_wgrad, *x.n_bwd_input, *x.has_weight_grads) for x in (self, other))
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
        held, pending, split = (
            tuple(count[each] for each in stages) for count in (passes, n_pending_wgrad, n_bwd_input)
        )
        load = Load(stage, kind, held, pending, split, tuple(each in has_weight_grads for each in stages))
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
