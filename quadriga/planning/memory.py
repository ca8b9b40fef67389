"""Memory of one rank at each moment of a step, in bytes: *active* memory, as torch's allocator counts it.

The moments are those of every kind of pass (`passes`), with the largest amounts that a schedule holds besides it
(`loads`), and of the optimizer. The largest moment is the peak. `docs/estimates.md` lists what is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from quadriga.planning.passes import PassSnapshot, StagePasses
from quadriga.planning.schedule import Load, unsharded_stages
from quadriga.planning.setup import Setup

# Reserved memory per byte of state, and per other active byte: fitted to published runs, see docs/estimates.md.
STATE_FACTOR, REST_FACTOR = 1.10, 1.18
STATE_KINDS = ("parameters", "optimizer state")  # besides gradients


@dataclass(frozen=True)
class OtherPasses:
    """Bytes on a rank besides a pass: activations of other passes, gradients of other stages' parameters.
    `has_weight_grads`: gradients of the stage's own parameters exist too."""

    activations: float
    gradients: float
    has_weight_grads: bool

    def dominates(self, other: OtherPasses) -> bool:
        """Whether every moment of a pass takes at least as much memory with this as with `other`."""
        return (
            self.activations >= other.activations
            and self.activations + self.gradients >= other.activations + other.gradients
            and self.has_weight_grads >= other.has_weight_grads
        )


NO_OTHER_PASSES = OtherPasses(0.0, 0.0, has_weight_grads=False)


@dataclass(frozen=True)
class MemorySnapshot:
    """Bytes that are alive at one moment. `static`: at all moments. `in_pass`: of the pass and its stage's gradients.
    `unsharded_grads`: gradients are not sharded yet."""

    name: str
    static: PassSnapshot
    in_pass: PassSnapshot
    others: OtherPasses
    unsharded_grads: bool

    @cached_property
    def total(self) -> float:
        return self.static.total + self.in_pass.total + self.others.activations + self.others.gradients

    @property
    def outside_state(self) -> float:
        """Bytes without parameters, optimizer moments and sharded gradients."""
        gradients = 0.0 if self.unsharded_grads else self.in_pass.by_kind.get("gradients", 0.0) + self.others.gradients
        return self.total - gradients - sum(self.static.by_kind.get(kind, 0.0) for kind in STATE_KINDS)

    @cached_property
    def by_kind(self) -> dict[str, float]:
        """Bytes by kind, without kinds of 0 bytes."""
        found = {**self.static.by_kind, **self.in_pass.by_kind}
        for kind, size in (("activations", self.others.activations), ("gradients", self.others.gradients)):
            found[kind] = found.get(kind, 0.0) + size
        if self.unsharded_grads:
            found["whole gradients"] = found.pop("gradients")
        return {kind.replace("_", " "): size for kind, size in found.items() if size}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline rank, on the one that holds most.

    `parameters`, `gradients`, `moments`: the state; gradients exist from the backward pass to the update.
    `activations`: saved by the forward passes of all `in_flight` micro-batches; `activations_per_block`: of one block
    and one micro-batch. `host`: bytes of the state in host memory. `timeline`: the moments of a step.
    """

    rank: int
    parameters: float
    gradients: float
    moments: float
    activations: float
    activations_per_block: float
    in_flight: int
    host: float
    timeline: tuple[MemorySnapshot, ...]

    @cached_property
    def peak(self) -> MemorySnapshot:
        return max(self.timeline, key=lambda moment: moment.total)

    @property
    def reserved(self) -> float:
        """Bytes that torch's allocator takes from the device: for the state, and for the peak of all else.

        Gradients count in full, whenever the peak is. They are allocated after the largest tensors are freed, in blocks
        of other sizes, so they do not reuse that memory.
        """
        state = self.parameters + self.gradients + self.moments if not self.host else 0.0
        rest = max(moment.outside_state for moment in self.timeline)
        return max(STATE_FACTOR * state + REST_FACTOR * rest, self.peak.total)

    @property
    def binding(self) -> tuple[str, ...]:
        """The largest kinds of the peak, the largest first, that make up two thirds of it."""
        kinds = sorted(self.peak.by_kind.items(), key=lambda part: -part[1])
        before = accumulate((size for _, size in kinds), initial=0.0)
        return tuple(kind for (kind, _), size in zip(kinds, before, strict=False) if size < 2 / 3 * self.peak.total)


def memory_of(setup: Setup, rank: int) -> Memory:
    """The memory of pipeline rank `rank` (0 without a pipeline)."""
    return _Rank(setup, rank).memory()


def memories_of(setup: Setup) -> tuple[Memory, ...]:
    """The memory of each pipeline rank. Equal stages are computed once."""
    known: dict[Any, StagePasses] = {}
    return tuple(_Rank(setup, rank, known).memory() for rank in range(setup.degrees.pp))


class _Rank:
    """One step of one rank."""

    def __init__(self, setup: Setup, rank: int, known: dict[Any, StagePasses] | None = None) -> None:
        self.setup, self.rank = setup, rank
        self.stages = setup.stages_of(rank)
        self.held = setup.held(rank)
        self.place = {number: place for place, number in enumerate(setup.stage_numbers(rank))}
        known = {} if known is None else known
        keys = [(setup.stages[number], self._unsharded_bytes, setup.modes_of_blocks(number)) for number in self.place]
        known |= {key: StagePasses(setup, *key) for key in keys if key not in known}
        self.passes = [known[key] for key in keys]
        self.loads = setup.loads(rank)

    def memory(self) -> Memory:
        parameters, moments = self.setup.parameter_bytes * self.held, 2 * self.setup.moment_bytes * self.held
        return Memory(
            rank=self.rank,
            parameters=parameters,
            gradients=parameters,
            moments=moments,
            activations=max(self.held_activations(load) for load in self.loads),
            activations_per_block=max(size for each in self.passes for size in (0.0, *each.kept.values())),
            in_flight=max(sum(load.passes) for load in self.loads),
            host=2 * parameters + moments if self.setup.offload else 0.0,
            timeline=tuple(self._timeline()),
        )

    @cached_property
    def _unsharded_bytes(self) -> float | None:
        """Peak bytes of gathered parameters in a pipeline that does not reshard; None otherwise."""
        setup = self.setup
        if setup.degrees.pp == 1 or setup.reshards:
            return None
        sizes = dict[int, float]()
        for number, stage in zip(self.place, self.stages, strict=True):
            sizes[number] = sum(count * setup.gathered(unit) for unit, count in stage.units())
        return max(sum(sizes[number] for number in stages) for stages in unsharded_stages(setup.order, self.rank))

    @cached_property
    def _static(self) -> PassSnapshot:
        setup = self.setup
        held = 0 if setup.offload else self.held
        state = {"parameters": setup.parameter_bytes * held, "optimizer state": 2 * setup.moment_bytes * held}
        # Receive buffers of a pipeline: hidden states of the previous stage, gradients of the next.
        neighbours = sum((not stage.first) + (not stage.last) for stage in self.stages)
        messages = neighbours * setup.micro_batches_per_call * setup.block.sizes["x"]
        return PassSnapshot("always", {**state, "tables and messages": setup.table_bytes + messages})

    def held_activations(self, load: Load) -> float:
        """Bytes of the activations of all passes, including the running one."""
        stages = zip(self.passes, load.passes, load.n_pending_wgrad, load.n_bwd_input, strict=True)
        return sum(
            passes * each.held_until_backward + n_pending_wgrad * each.held_until_wgrad + n_bwd_input * each.x
            for each, passes, n_pending_wgrad, n_bwd_input in stages
        )

    def _timeline(self) -> Iterator[MemorySnapshot]:
        for (stage, kind), undominated in self._heaviest().items():
            for others in undominated:
                for in_pass in self.passes[self.place[stage]].snapshots(kind, others.has_weight_grads):
                    yield self._snapshot(in_pass, others)
        final = sum(each.final_grads for each in self.passes)
        if self.setup.degrees.pp > 1 and self.setup.keeps_unsharded_grads:
            reduced = max(each.reduction_bytes for each in self.passes)
            by_kind = {"gathered_parameters": self._unsharded_bytes or 0.0, "gradients": final, "reduction": reduced}
            yield self._snapshot(PassSnapshot("reductions", by_kind), NO_OTHER_PASSES)
        setup, units = self.setup, [unit for stage in self.stages for unit, _ in stage.units()]
        largest = max(unit.largest(setup.degrees.tp, setup.shards) for unit in units)
        update = 0.0 if setup.offload else setup.update_bytes(self.held, largest)
        optimizer = PassSnapshot("optimizer", {"gradients": final, "temporaries": update})
        yield self._snapshot(optimizer, NO_OTHER_PASSES)

    def _snapshot(self, in_pass: PassSnapshot, others: OtherPasses) -> MemorySnapshot:
        return MemorySnapshot(in_pass.name, self._static, in_pass, others, self.setup.keeps_unsharded_grads)

    def _heaviest(self) -> dict[tuple[int, str], list[OtherPasses]]:
        """By stage and kind of pass, the amounts besides it that no other amounts dominate."""
        found: dict[tuple[int, str], list[OtherPasses]] = {}
        for load in self.loads:
            others = self._other_passes(load)
            undominated = found.setdefault((load.stage, load.kind), [])
            if not any(other.dominates(others) for other in undominated):
                undominated[:] = [other for other in undominated if not others.dominates(other)] + [others]
        return found

    def _other_passes(self, load: Load) -> OtherPasses:
        place = self.place[load.stage]
        with_grads = [number for number, exist in enumerate(load.has_weight_grads) if exist and number != place]
        gradients = sum(self.passes[number].final_grads for number in with_grads)
        activations = self.held_activations(load) - self.passes[place].held_until_backward
        return OtherPasses(activations, gradients, load.has_weight_grads[place])
