"""What one rank holds at each moment of a step, in bytes: what is *active*, as torch's allocator would say.

A step is followed from moment to moment, with what is alive in each: the loss, the backward pass of the output layer,
of each block and of the embedding, the reductions between, the optimizer. The greatest moment is the peak, and its
greatest parts are what binds. `docs/estimates.md` says what is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from quadriga.estimate.activations import WIDE
from quadriga.estimate.anatomy import Unit
from quadriga.estimate.setup import Setup

# What the allocator takes from the device for what is active (`reserved`): fitted to published runs, docs/estimates.md.
STATE_FACTOR, REST_FACTOR = 1.10, 1.18
STATE = ("parameters", "optimizer state", "gradients")
# Float32 numbers a logit that the loss makes beside those it keeps: forward pass, backward pass.
LOSS_COPIES = {"plain": (0, 2), "parallel": (1, 3)}


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
    return _Step(setup, rank).memory()


class _Step:
    """One step of one rank."""

    def __init__(self, setup: Setup, rank: int) -> None:
        self.setup, self.rank = setup, rank
        self.stages = setup.stages_of(rank)
        self.tp, self.shards = setup.degrees.tp, setup.shards
        self.in_flight = self.at_once = setup.in_flight(rank)
        self.before = 0.0  # gradients of earlier micro-batches
        self.has_head = any(stage.last for stage in self.stages)
        self.is_first = any(stage.first for stage in self.stages)
        self.block_unit = max(self.stages, key=lambda stage: stage.blocks).block
        self.others = tuple(unit for stage in self.stages for unit in stage.others)
        self.modes = [mode for stage in self.stages for mode in setup.modes_of_blocks(stage.blocks)]
        self.kept = {mode: setup.block.bytes(setup.kept(mode)) for mode in set(self.modes)}
        self.held = sum(stage.held(self.tp, self.shards) for stage in self.stages)

    def memory(self) -> Memory:
        parameters, moments = self.setup.parameter_bytes * self.held, 2 * self.setup.moment_bytes * self.held
        return Memory(
            rank=self.rank,
            parameters=parameters,
            gradients=parameters,
            moments=moments,
            activations=self.of_blocks + self.of_head,
            activations_a_block=max(self.kept.values(), default=0.0),
            in_flight=self.in_flight,
            host=2 * parameters + moments if self.setup.offload else 0.0,
            timeline=tuple(self.timeline()),
        )

    # --- what is alive for longer ------------------------------------------------------------------------------------

    @cached_property
    def static(self) -> dict[str, float]:
        setup = self.setup
        state = {
            "parameters": setup.parameter_bytes * self.held,
            "optimizer state": 2 * setup.moment_bytes * self.held,
        }
        return {**({} if setup.offload else state), "tables and messages": setup.table_bytes + self.messages}

    @cached_property
    def messages(self) -> float:
        """Buffers of a pipeline for what comes in: hidden states from before, gradients from behind."""
        if self.setup.degrees.pp == 1:
            return 0.0
        neighbours = sum((not stage.first) + (not stage.last) for stage in self.stages)
        return neighbours * self.setup.micro_batches_a_call * self.setup.block.sizes["x"]

    @cached_property
    def in_one_pass(self) -> float:
        """Activations of this rank's blocks, of one micro-batch through all of its stages."""
        return sum(self.kept[mode] for mode in self.modes)

    @property
    def of_blocks(self) -> float:
        return self.in_one_pass * self.at_once / len(self.stages)

    @cached_property
    def kept_of_head(self) -> float:
        """Of the last norm and the output layer. A loss in pieces keeps gradients in the place of the layer's input."""
        head = self.setup.head
        if not self.has_head:
            return 0.0
        if self.setup.loss_pieces == 1:
            return head.bytes(head.everything)
        return head.bytes(head.everything - {self.head_input}) + self._of_pieces

    @property
    def head_input(self) -> str:
        return self.setup.head.trace.operations[-1].takes[0]

    @property
    def _output_matrix(self) -> int:
        """Numbers of the output matrix on this rank."""
        matrix = self.setup.head.trace.operations[-1].matrix
        assert matrix is not None
        return matrix[0] * matrix[1] // self.tp

    @property
    def _of_pieces(self) -> float:
        """Gradients that a loss in pieces has made: of the hidden states and of the output matrix."""
        return self.setup.head.sizes[self.head_input] + self._output_matrix * self.setup.itemsize

    @property
    def of_head(self) -> float:
        """And the logarithms of the probabilities, of all tokens."""
        whole = self.has_head and self.setup.loss_pieces == 1
        return self.kept_of_head + (self.setup.logits * WIDE if whole else 0.0)

    def gathered(self, blocks: int, ends: tuple[Unit, ...]) -> float:
        """Parameters that are together while `blocks` are still to go backward, and before those of `ends` did.

        With resharding: of the block that is at work and of the one before it, which is fetched ahead, where there are
        ranks to fetch it from. A pipeline keeps everything together to its last micro-batch.
        """
        setup, one = self.setup, self.setup.gathered(self.block_unit)
        if setup.reshards:
            ahead = 1 if setup.shards > 1 and blocks > 1 else 0
            kept = sum(setup.gathered(unit) for unit in ends if not unit.reshard)
            return kept + one * (min(blocks, 1) + ahead)
        if setup.degrees.pp > 1:
            return len(self.modes) * one + sum(map(setup.gathered, self.others))
        return blocks * one + sum(map(setup.gathered, ends))

    # --- gradients of parameters -------------------------------------------------------------------------------------

    def _made(self, unit: Unit) -> float:
        """Before they are reduced: whole, in the computing dtype. Where nothing is wrapped they are final."""
        return self.setup.itemsize * unit.whole(self.tp) if self.setup.is_wrapped else 0.0

    def _final(self, unit: Unit) -> float:
        """What is left of them on the device until the update."""
        if self.setup.keeps_gradients_whole:
            return self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
        return 0.0 if self.setup.offload else self.setup.parameter_bytes * unit.held(self.tp, self.shards)

    def _sent(self, unit: Unit) -> float:
        """The buffer of the reduction."""
        whole = self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
        return whole if self.setup.is_wrapped and not self.setup.keeps_gradients_whole else 0.0

    @cached_property
    def all_final(self) -> float:
        return len(self.modes) * self._final(self.block_unit) + sum(map(self._final, self.others))

    # --- moments -----------------------------------------------------------------------------------------------------

    def timeline(self) -> Iterator[Moment]:
        """The first micro-batch that goes backward finds no gradients; a later one finds all, and where they are few
        one micro-batch less beside it."""
        yield from self._passes()
        if self.setup.micro_batches > 1:
            self.before = self.all_final
            self.at_once -= self.setup.micro_batches * len(self.stages) <= self.in_flight
            yield from self._passes()
            self.before, self.at_once = 0.0, self.in_flight
        yield self._moment("optimizer", gradients=self.all_final, temporaries=self._update)

    def _passes(self) -> Iterator[Moment]:
        if self.has_head:
            yield from self._loss()
        yield from self._blocks()
        yield from self._embedding()

    def _moment(self, name: str, **parts: float) -> Moment:
        if self.setup.keeps_gradients_whole and "gradients" in parts:
            parts["whole_gradients"] = parts.pop("gradients")
        named = {kind.replace("_", " "): size for kind, size in parts.items() if size}
        return Moment(name, {**self.static, **named})

    def _loss(self) -> Iterator[Moment]:
        setup, head = self.setup, self.setup.head
        forward, backward = LOSS_COPIES["parallel" if setup.parallel_loss else "plain"]
        in_compute = setup.itemsize + (WIDE if setup.itemsize < WIDE else 0)  # as they are made, and widened
        together = self.gathered(0 if setup.reshards else len(self.modes), self.others)
        alive = {"gathered_parameters": together, "gradients": self.before}
        at_once = setup.logits / setup.loss_pieces
        in_pieces = setup.loss_pieces > 1
        # The input of the output layer is still there, and the sum of the matrix's gradients over pieces is float32.
        beside = head.sizes[self.head_input] + self._output_matrix * (WIDE - setup.itemsize) if in_pieces else 0.0
        kept = self.of_blocks + self.kept_of_head + beside
        for name, size in (("loss", in_compute + WIDE * (1 + forward)), ("loss, backward", WIDE * (1 + backward))):
            yield self._moment(name, **alive, activations=kept, logits_and_loss=at_once * size)
        made = sum(self._made(unit) or (0.0 if self.before else self._final(unit)) for unit in self._head_units)
        if in_pieces:
            piece = at_once * setup.itemsize + self._output_matrix * setup.itemsize
            yield self._moment("loss, a piece's weights", **alive, activations=kept, logits_and_loss=piece)
            alive["gradients"] = self.before + made
            yield self._moment("output layer, backward", **alive, activations=kept - beside + self._of_pieces)
            return
        walk = head.backward_peak(head.everything, 0.0) - head.sizes[head.trace.gives]
        alive["gradients"] = self.before + made
        logits = setup.logits * setup.itemsize
        yield self._moment("output layer, backward", **alive, activations=self.of_blocks + walk, logits_and_loss=logits)

    @property
    def _head_units(self) -> tuple[Unit, ...]:
        return self.stages[-1].others[-1:] if self.has_head else ()

    @property
    def _ties(self) -> bool:
        """Whether one unit stands at both ends: together, and its gradients unsent, until all blocks are through."""
        return self.is_first and self.has_head and len(self.others) == 1

    @property
    def _first_units(self) -> tuple[Unit, ...]:
        if self._ties:
            return self.others
        return tuple(unit for unit in self.others if unit not in self._head_units)

    def _blocks(self) -> Iterator[Moment]:
        setup, block = self.setup, self.setup.block
        elsewhere = self.of_blocks - self.in_one_pass / len(self.stages)
        done = self.before or sum(map(self._made if self._ties else self._final, self._head_units))
        if self._ties and self.before:
            done += sum(map(self._made, self._head_units))
        gone = list(accumulate(self.kept[mode] for mode in reversed(self.modes)))
        weights = setup.itemsize if setup.is_wrapped or not self.before else 0.0
        walk = block.backward_peak(block.everything | {"x"}, weights)
        final, count = 0.0 if self.before else self._final(self.block_unit), len(self.modes)
        sent = self._sent(self.block_unit)
        ends = sorted({0, 1, count - 2, count - 1} & set(range(count)))
        for number in ends if len(self.kept) == 1 else range(count):  # alike ones lie between
            kept = (self.in_one_pass - gone[number]) / len(self.stages)
            alive = {"gathered_parameters": self.gathered(count - number, self._first_units)}
            waiting = sent if number or self._ties else sum(map(self._sent, self._head_units))
            yield self._moment(
                f"block {count - 1 - number}, backward",
                **alive,
                gradients=done + number * final,
                reduction=waiting,
                activations=elsewhere + kept + walk,
            )
            yield self._moment(
                f"block {count - 1 - number}, reduction",
                **alive,
                gradients=done + (number + 1) * final + self._made(self.block_unit),
                reduction=sent,
                activations=elsewhere + kept + block.sizes["x"],
            )

    def _embedding(self) -> Iterator[Moment]:
        embedding = self.others[0] if self.is_first and self.others else None
        if embedding is None:
            return
        made = self._made(embedding) if not self.before or self.setup.is_wrapped else 0.0
        done = self.before or self.all_final - self._final(embedding)
        final = self._final(embedding) if not made or not self.before else 0.0
        yield self._moment(
            "embedding, backward",
            gradients=done + made + final,
            reduction=max(self._sent(self.block_unit), self._sent(embedding)),
            activations=self.setup.block.sizes["x"],
        )

    @property
    def _update(self) -> float:
        """What the optimizer makes and drops."""
        largest = max(unit.largest(self.tp, self.shards) for stage in self.stages for unit, _ in stage.units())
        return 0.0 if self.setup.offload else self.setup.update_bytes(self.held, largest)
