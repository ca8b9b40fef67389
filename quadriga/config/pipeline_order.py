"""The order of a pipeline schedule: the passes of micro-batches through stages that each rank computes. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import NamedTuple

ACTIVATION_DELTA = {"F": 1, "B": -1, "I": 0, "W": -1}  # change in the number of passes whose activations are held


class Action(NamedTuple):
    """One pass through a stage. `kind`: F forward, B backward, I and W the two parts of a split backward pass:
    gradients of the stage's input, and of its weights."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True, eq=False)  # compared by identity, because its cached properties take time to compute
class PipelineOrder:
    """The actions of each rank. Stages are numbered from 0 without a gap, and each is computed by one rank."""

    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def stage_ranks(self) -> tuple[int, ...]:
        """The rank that computes each stage, by stage."""
        owners = {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}
        return tuple(owners[stage] for stage in range(len(owners)))

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """By rank, the largest number of forward passes whose backward pass is not finished."""
        return tuple(max(accumulate(ACTIVATION_DELTA[action.kind] for action in actions)) for actions in self.ranks)

    @cached_property
    def splits_backward(self) -> bool:
        return any(action.kind == "I" for actions in self.ranks for action in actions)

    @cached_property
    def merged_backward(self) -> PipelineOrder:
        """The same order with whole backward passes, each at the place of its part I."""
        if not self.splits_backward:
            return self
        whole = {"I": "B"}
        return PipelineOrder(
            tuple(
                tuple(each._replace(kind=whole.get(each.kind, each.kind)) for each in actions if each.kind != "W")
                for actions in self.ranks
            )
        )

    @cached_property
    def counts(self) -> tuple[Mapping[tuple[int, str], int], ...]:
        """By rank, the number of actions by (stage, kind)."""
        return tuple(Counter((action.stage, action.kind) for action in actions) for actions in self.ranks)

    def idle_shares(self, seconds: Mapping[tuple[int, str], float]) -> tuple[float, ...]:
        """By rank, the idle time divided by the compute time.

        `seconds`: duration of an action, by (stage, kind). Messages take no time.
        """
        ends = max(_simulate(self, seconds).now)
        busy = [sum(number * seconds[what] for what, number in counts.items()) for counts in self.counts]
        return tuple(ends / each - 1 for each in busy)

    @property
    def deadlock(self) -> tuple[tuple[int, Action], ...]:
        """The ranks that wait for each other forever, each with the action that it cannot start. Empty if none."""
        seconds = {(stage, kind): 1.0 for stage in range(len(self.stage_ranks)) for kind in ACTIVATION_DELTA}
        places = zip(_simulate(self, seconds).at, self.ranks, strict=True)
        return tuple((rank, actions[at]) for rank, (at, actions) in enumerate(places) if at < len(actions))


@dataclass(frozen=True)
class _Progress:
    """By rank: the number of finished actions (`at`), and the time in seconds (`now`)."""

    at: list[int]
    now: list[float]


def _simulate(order: PipelineOrder, seconds: Mapping[tuple[int, str], float]) -> _Progress:
    """Run the actions of all ranks until no rank can start another one."""
    last = len(order.stage_ranks) - 1
    forward: dict[tuple[int, int], float] = {}
    backward: dict[tuple[int, int], float] = {}
    progress = _Progress([0] * len(order.ranks), [0.0] * len(order.ranks))
    advanced = True
    while advanced:
        advanced = False
        for rank, actions in enumerate(order.ranks):
            now = progress.now[rank]
            for stage, kind, each in islice(actions, progress.at[rank], None):
                ready: float | None = 0.0
                if kind == "F":
                    ready = forward.get((stage - 1, each)) if stage else 0.0
                elif kind != "W":
                    ready = backward.get((stage + 1, each)) if stage < last else 0.0
                if ready is None:
                    break
                now = max(now, ready) + seconds[stage, kind]
                if kind != "W":
                    (forward if kind == "F" else backward)[stage, each] = now
                progress.at[rank] += 1
                advanced = True
            progress.now[rank] = now
    return progress
