"""What one rank holds at each moment of a step, in bytes: what is *active*, as torch's allocator would say.

A step is followed from moment to moment, with what is alive in each: every kind of pass (`passes`) under the greatest
loads that a schedule puts beside it (`loads`), and the optimizer. The greatest moment is the peak, and its greatest
parts are what binds. `docs/estimates.md` says what is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from quadriga.estimate.loads import Load
from quadriga.estimate.passes import Beside, StagePasses
from quadriga.estimate.setup import Setup

# What the allocator takes from the device for what is active (`reserved`): fitted to published runs, docs/estimates.md.
STATE_FACTOR, REST_FACTOR = 1.10, 1.18
STATE = ("parameters", "optimizer state", "gradients")


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, by kind, in bytes."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """What the ranks of one pipeline rank hold, those that hold most of it; in bytes.

    `parameters`, `gradients`, `moments`: the state; gradients live from the backward pass to the update. `activations`:
    what forward passes leave behind, of all micro-batches under way; `activations_a_block`: of one block and one
    micro-batch. `host`: of the state, what lies in host memory.
    """

    rank: int
    parameters: float
    gradients: float
    moments: float
    activations: float
    activations_a_block: float
    in_flight: int
    host: float
    timeline: tuple[Moment, ...]

    @cached_property
    def peak(self) -> Moment:
        return max(self.timeline, key=lambda moment: moment.total)

    @property
    def reserved(self) -> float:
        """What torch's allocator takes from the device: of the whole state, and of the most that is needed beside it.

        Gradients count in full, whenever the peak is: they are made when the greatest tensors have just been freed, in
        pieces of other sizes.
        """
        state = self.parameters + self.gradients + self.moments if not self.host else 0.0
        rest = (sum(size for kind, size in each.parts.items() if kind not in STATE) for each in self.timeline)
        return max(STATE_FACTOR * state + REST_FACTOR * max(rest), self.peak.total)

    @property
    def binding(self) -> tuple[str, ...]:
        """The kinds that make most of the peak, the greatest first, until two thirds of it are named."""
        named: list[str] = []
        so_far = 0.0
        for kind, size in sorted(self.peak.parts.items(), key=lambda part: -part[1]):
            if so_far >= 2 / 3 * self.peak.total:
                break
            named.append(kind)
            so_far += size
        return tuple(named)


def memory_of(setup: Setup, rank: int) -> Memory:
    """Of the pipeline's rank `rank`; 0 without a pipeline."""
    return _Rank(setup, rank).memory()


class _Rank:
    """One step of one rank."""

    def __init__(self, setup: Setup, rank: int) -> None:
        self.setup, self.rank = setup, rank
        self.stages = setup.stages_of(rank)
        self.held = sum(stage.held(setup.degrees.tp, setup.shards) for stage in self.stages)
        self.passes = [StagePasses(setup, stage, self._together) for stage in self.stages]
        self.place = {number: place for place, number in enumerate(setup.stage_numbers(rank))}
        self.loads = setup.loads(rank)

    def memory(self) -> Memory:
        parameters, moments = self.setup.parameter_bytes * self.held, 2 * self.setup.moment_bytes * self.held
        return Memory(
            rank=self.rank,
            parameters=parameters,
            gradients=parameters,
            moments=moments,
            activations=max(self._left(load) for load in self.loads),
            activations_a_block=max(size for each in self.passes for size in (0.0, *each.kept.values())),
            in_flight=max(sum(load.passes) for load in self.loads),
            host=2 * parameters + moments if self.setup.offload else 0.0,
            timeline=tuple(self._timeline()),
        )

    @cached_property
    def _together(self) -> float | None:
        """Parameters that are gathered at once in a pipeline which does not reshard: torch's keeps three stages so."""
        setup = self.setup
        if setup.degrees.pp == 1 or setup.reshards:
            return None
        return sum(count * setup.gathered(unit) for stage in self.stages for unit, count in stage.units())

    @cached_property
    def _static(self) -> dict[str, float]:
        setup = self.setup
        state = {
            "parameters": setup.parameter_bytes * self.held,
            "optimizer state": 2 * setup.moment_bytes * self.held,
        }
        return {**({} if setup.offload else state), "tables and messages": setup.table_bytes + self._messages}

    @property
    def _messages(self) -> float:
        """Buffers of a pipeline for what comes in: hidden states from before, gradients from behind."""
        if self.setup.degrees.pp == 1:
            return 0.0
        neighbours = sum((not stage.first) + (not stage.last) for stage in self.stages)
        return neighbours * self.setup.micro_batches_a_call * self.setup.block.sizes["x"]

    def _left(self, load: Load) -> float:
        """Activations of all passes, the one at work among them."""
        return sum(
            passes * each.left + halves * each.left_by_inputs + fed * each.x
            for each, passes, halves, fed in zip(self.passes, load.passes, load.halves, load.fed, strict=True)
        )

    def _timeline(self) -> Iterator[Moment]:
        for load in self.loads:
            place = self.place[load.stage]
            gradients = sum(
                each.final
                for number, (each, begun) in enumerate(zip(self.passes, load.begun, strict=True))
                if begun and number != place
            )
            at_work = self.passes[place]
            beside = Beside(self._left(load) - at_work.left, gradients, load.begun[place])
            for name, parts in at_work.moments(load.kind, beside):
                yield self._moment(name, parts)
        final = sum(each.final for each in self.passes)
        yield self._moment("optimizer", {"gradients": final, "temporaries": self._update})

    def _moment(self, name: str, parts: dict[str, float]) -> Moment:
        if self.setup.keeps_gradients_whole:
            parts = {"whole_gradients" if kind == "gradients" else kind: size for kind, size in parts.items()}
        named = {kind.replace("_", " "): size for kind, size in parts.items() if size}
        return Moment(name, {**self._static, **named})

    @property
    def _update(self) -> float:
        """What the optimizer makes and drops."""
        setup = self.setup
        largest = max(
            unit.largest(setup.degrees.tp, setup.shards) for stage in self.stages for unit, _ in stage.units()
        )
        return 0.0 if setup.offload else setup.update_bytes(self.held, largest)
