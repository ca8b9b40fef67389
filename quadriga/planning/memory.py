"""What one rank holds at each moment of a step, in bytes: what is *active*, as torch's allocator would say.

A step is followed from moment to moment, with what is alive in each: every kind of pass (`passes`) under the greatest
loads that a schedule puts beside it (`loads`), and the optimizer. The greatest moment is the peak, and its greatest
parts are what binds. `docs/estimates.md` says what is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quadriga.planning.loads import Load
from quadriga.planning.passes import Part, StagePasses
from quadriga.planning.schedule import together
from quadriga.planning.setup import Setup

# What the allocator takes from the device for what is active (`reserved`): fitted to published runs, docs/estimates.md.
STATE_FACTOR, REST_FACTOR = 1.10, 1.18
STATE = ("parameters", "optimizer state")  # and gradients


@dataclass(frozen=True)
class Beside:
    """What is on a rank beside a pass, in bytes: activations of other passes, gradients of other stages' parameters.
    `begun`: those of the stage itself are there as well."""

    activations: float
    gradients: float
    begun: bool

    def covers(self, other: Beside) -> bool:
        """Whether every moment of a pass holds as much beside this as beside `other`."""
        return (
            self.activations >= other.activations
            and self.activations + self.gradients >= other.activations + other.gradients
            and self.begun >= other.begun
        )


NOTHING = Beside(0.0, 0.0, begun=False)


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, in bytes. `static`: at every one of them. `whole`: gradients are not cut up."""

    name: str
    static: Part
    part: Part
    beside: Beside
    whole: bool

    @cached_property
    def total(self) -> float:
        return self.static.total + self.part.total + self.beside.activations + self.beside.gradients

    @property
    def beside_the_state(self) -> float:
        """All but parameters, moments of the optimizer, and gradients of which each rank holds its part."""
        gradients = 0.0 if self.whole else self.part.parts.get("gradients", 0.0) + self.beside.gradients
        return self.total - gradients - sum(self.static.parts.get(kind, 0.0) for kind in STATE)

    @cached_property
    def parts(self) -> dict[str, float]:
        """By kind."""
        found = {**self.static.parts, **self.part.parts}
        for kind, size in (("activations", self.beside.activations), ("gradients", self.beside.gradients)):
            found[kind] = found.get(kind, 0.0) + size
        if self.whole:
            found["whole gradients"] = found.pop("gradients")
        return {kind.replace("_", " "): size for kind, size in found.items() if size}


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
        rest = max(moment.beside_the_state for moment in self.timeline)
        return max(STATE_FACTOR * state + REST_FACTOR * rest, self.peak.total)

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


def memories_of(setup: Setup) -> tuple[Memory, ...]:
    """Of each rank of the pipeline. Stages alike are worked out once."""
    known: dict[Any, StagePasses] = {}
    return tuple(_Rank(setup, rank, known).memory() for rank in range(setup.degrees.pp))


class _Rank:
    """One step of one rank."""

    def __init__(self, setup: Setup, rank: int, known: dict[Any, StagePasses] | None = None) -> None:
        self.setup, self.rank = setup, rank
        self.stages = setup.stages_of(rank)
        self.held = sum(stage.held(setup.degrees.tp, setup.shards) for stage in self.stages)
        self.place = {number: place for place, number in enumerate(setup.stage_numbers(rank))}
        known = {} if known is None else known
        keys = [(setup.stages[number], self._together, setup.modes_of_blocks(number)) for number in self.place]
        for key in keys:
            if key not in known:
                known[key] = StagePasses(setup, *key)
        self.passes = [known[key] for key in keys]
        self.loads = setup.loads(rank)

    def memory(self) -> Memory:
        parameters, moments = self.setup.parameter_bytes * self.held, 2 * self.setup.moment_bytes * self.held
        return Memory(
            rank=self.rank,
            parameters=parameters,
            gradients=parameters,
            moments=moments,
            activations=max(self.left(load) for load in self.loads),
            activations_a_block=max(size for each in self.passes for size in (0.0, *each.kept.values())),
            in_flight=max(sum(load.passes) for load in self.loads),
            host=2 * parameters + moments if self.setup.offload else 0.0,
            timeline=tuple(self._timeline()),
        )

    @cached_property
    def _together(self) -> float | None:
        """Parameters that are together at once in a pipeline which does not reshard."""
        setup = self.setup
        if setup.degrees.pp == 1 or setup.reshards:
            return None
        sizes = {
            number: sum(count * setup.gathered(unit) for unit, count in stage.units())
            for number, stage in zip(self.place, self.stages, strict=True)
        }
        return max(sum(sizes[number] for number in stages) for stages in together(setup.order, self.rank))

    @cached_property
    def _static(self) -> Part:
        setup = self.setup
        on_device = 0 if setup.offload else self.held
        state = {
            "parameters": setup.parameter_bytes * on_device,
            "optimizer state": 2 * setup.moment_bytes * on_device,
        }
        return Part.of("always", {**state, "tables and messages": setup.table_bytes + self._messages})

    @property
    def _messages(self) -> float:
        """Buffers of a pipeline for what comes in: hidden states from before, gradients from behind."""
        if self.setup.degrees.pp == 1:
            return 0.0
        neighbours = sum((not stage.first) + (not stage.last) for stage in self.stages)
        return neighbours * self.setup.micro_batches_a_call * self.setup.block.sizes["x"]

    def left(self, load: Load) -> float:
        """Activations of all passes, the one at work among them."""
        return sum(
            passes * each.left + halves * each.left_by_inputs + fed * each.x
            for each, passes, halves, fed in zip(self.passes, load.passes, load.halves, load.fed, strict=True)
        )

    def _timeline(self) -> Iterator[Moment]:
        for (stage, kind), alike in self._heaviest().items():
            for beside in alike:
                for part in self.passes[self.place[stage]].moments(kind, beside.begun):
                    yield self._moment(part, beside)
        final = sum(each.final for each in self.passes)
        if self.setup.degrees.pp > 1 and self.setup.keeps_gradients_whole:
            reduced = max(each.reduced for each in self.passes)
            parts = {"gathered_parameters": self._together or 0.0, "gradients": final, "reduction": reduced}
            yield self._moment(Part.of("reductions", parts), NOTHING)
        parts = {"gradients": final, "temporaries": self._update}
        yield self._moment(Part.of("optimizer", parts), NOTHING)

    def _moment(self, part: Part, beside: Beside) -> Moment:
        return Moment(part.name, self._static, part, beside, self.setup.keeps_gradients_whole)

    def _heaviest(self) -> dict[tuple[int, str], list[Beside]]:
        """By stage and kind of pass, what is beside it at its worst: nothing that is covered by another."""
        found: dict[tuple[int, str], list[Beside]] = {}
        for load in self.loads:
            beside = self._beside(load)
            alike = found.setdefault((load.stage, load.kind), [])
            if not any(other.covers(beside) for other in alike):
                alike[:] = [other for other in alike if not beside.covers(other)] + [beside]
        return found

    def _beside(self, load: Load) -> Beside:
        place = self.place[load.stage]
        others = (each.final for number, each in enumerate(self.passes) if load.begun[number] and number != place)
        return Beside(self.left(load) - self.passes[place].left, sum(others), load.begun[place])

    @property
    def _update(self) -> float:
        """What the optimizer makes and drops."""
        setup = self.setup
        largest = max(
            unit.largest(setup.degrees.tp, setup.shards) for stage in self.stages for unit, _ in stage.units()
        )
        return 0.0 if setup.offload else setup.update_bytes(self.held, largest)
