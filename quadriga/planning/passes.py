"""What one pass through a stage needs, from moment to moment, in bytes: the loss, the backward pass of the output
layer, of each block and of the embedding, and the reductions between. A run without a pipeline is one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from quadriga.planning.activations import WIDE
from quadriga.planning.anatomy import Stage, Unit
from quadriga.planning.setup import Setup

# Float32 numbers a logit that the loss makes beside those it keeps: forward pass, backward pass.
LOSS_COPIES = {"plain": (0, 2), "parallel": (1, 3)}
Parts = tuple[str, dict[str, float]]  # a moment's name, and what is alive in it by kind


@dataclass(frozen=True)
class Part:
    """A moment of a pass, and what the pass itself and its stage's gradients take in it: by kind, and in all."""

    name: str
    parts: Mapping[str, float]
    total: float

    @classmethod
    def of(cls, name: str, parts: Mapping[str, float]) -> Part:
        return cls(name, parts, sum(parts.values()))


class StagePasses:
    """`together`: bytes of parameters that a pipeline keeps gathered; None where each unit is gathered by itself.
    `modes`: how each block of the stage recomputes."""

    def __init__(self, setup: Setup, stage: Stage, together: float | None, modes: tuple[str, ...]) -> None:
        self.setup, self.stage, self.together = setup, stage, together
        self.tp, self.shards = setup.degrees.tp, setup.shards
        self.modes = modes
        self.kept = {mode: setup.block.bytes(setup.kept(mode)) for mode in set(self.modes)}
        self.x = setup.block.sizes["x"]
        self._moments = dict[tuple[str, bool], tuple[Part, ...]]()

    # --- what a pass leaves until its backward pass ------------------------------------------------------------------

    @cached_property
    def left(self) -> float:
        """All of it, the logarithms of the probabilities among it."""
        whole = self.stage.last and self.setup.loss_pieces == 1
        return self.of_blocks + self.of_head + self.output + (self.setup.logits * WIDE if whole else 0.0)

    @cached_property
    def of_blocks(self) -> float:
        return sum(self.kept[mode] for mode in self.modes) - self._received

    @property
    def _received(self) -> float:
        """Of the first block's input: it lies in the buffer that it was received into."""
        if self.stage.first or not self.modes or "x" not in self.setup.kept(self.modes[0]):
            return 0.0
        return self.x

    @cached_property
    def output(self) -> float:
        """What a pipeline holds on to: hidden states that it has sent, logits."""
        if self.setup.degrees.pp == 1:
            return 0.0
        return self.setup.logits * self.setup.itemsize if self.stage.last else self.x

    @cached_property
    def of_head(self) -> float:
        """Of the last norm and the output layer. A loss in pieces keeps gradients in the place of the layer's input."""
        head = self.setup.head
        if not self.stage.last:
            return 0.0
        if self.setup.loss_pieces == 1:
            return head.bytes(head.everything)
        return head.bytes(head.everything - {self._head_input}) + self._of_pieces

    @property
    def _head_input(self) -> str:
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
        return self.setup.head.sizes[self._head_input] + self._output_matrix * self.setup.itemsize

    @cached_property
    def left_by_inputs(self) -> float:
        """What gradients of inputs leave until those of weights: gradients of what each weight gives. The last one of
        them is what was received; the loss itself, and its logits, are gone."""
        blocks = len(self.modes) * self.setup.block.weighted
        if not self.stage.last:
            return blocks - self.x
        return blocks + self.setup.head.weighted - self.output - self.setup.logits * WIDE

    # --- parameters and their gradients ------------------------------------------------------------------------------

    def gathered(self, blocks: int, ends: tuple[Unit, ...]) -> float:
        """Parameters that are together while `blocks` are still to go backward, and before those of `ends` did.

        With resharding: of the block that is at work and of the one before it, which is fetched ahead, where there are
        ranks to fetch it from. A pipeline keeps everything together to its last micro-batch.
        """
        if self.together is not None:
            return self.together
        setup, one = self.setup, self.setup.gathered(self.stage.block)
        if setup.reshards:
            ahead = 1 if setup.shards > 1 and blocks > 1 else 0
            kept = sum(setup.gathered(unit) for unit in ends if not unit.reshard)
            return kept + one * (min(blocks, 1) + ahead)
        return blocks * one + sum(map(setup.gathered, ends))

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
    def final(self) -> float:
        """Of the whole stage."""
        return sum(count * self._final(unit) for unit, count in self.stage.units())

    @property
    def reduced(self) -> float:
        """What the reduction of gradients that were kept whole makes, of the greatest unit: what is sent, and what
        comes back. Without tensor parallelism the gradients go as soon as they are copied."""

        def of(unit: Unit) -> float:
            sent = self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
            back = self.setup.parameter_bytes * unit.held(self.tp, self.shards)
            return sent + back if self.tp > 1 else max(sent, back)

        return max((of(unit) for unit, _ in self.stage.units()), default=0.0)

    @property
    def _head_units(self) -> tuple[Unit, ...]:
        return self.stage.others[-1:] if self.stage.last else ()

    @property
    def _ties(self) -> bool:
        """Whether one unit stands at both ends: together, and its gradients unsent, until all blocks are through."""
        return self.stage.first and self.stage.last and len(self.stage.others) == 1

    @property
    def _first_units(self) -> tuple[Unit, ...]:
        if self._ties:
            return self.stage.others
        return tuple(unit for unit in self.stage.others if unit not in self._head_units)

    # --- moments -----------------------------------------------------------------------------------------------------

    def moments(self, kind: str, begun: bool) -> tuple[Part, ...]:
        """Of an action: F a forward pass, B a backward pass, I and W its two parts. `begun`: gradients of the stage's
        parameters are there already."""
        if (kind, begun) not in self._moments:
            found = [
                (name, {key: size for key, size in parts.items() if size}) for name, parts in self._of(kind, begun)
            ]
            self._moments[kind, begun] = tuple(Part(name, parts, sum(parts.values())) for name, parts in found)
        return self._moments[kind, begun]

    def _of(self, kind: str, begun: bool) -> Iterator[Parts]:
        """The first stage has no input to make gradients of, and leaves all to the second part of a backward pass."""
        if kind == "F":
            yield from self._loss(begun)
        elif kind == "B" or (kind == "W" and self.stage.first):
            yield from self._backward(begun)
        elif kind == "I" and not self.stage.first:
            yield from self._of_inputs(begun)
        elif kind == "W":
            yield from self._of_weights(begun)

    def _before(self, begun: bool) -> float:
        """Gradients of parameters that are there."""
        return self.final if begun else 0.0

    def _loss(self, begun: bool) -> Iterator[Parts]:
        if self.stage.last:
            forward, _ = LOSS_COPIES["parallel" if self.setup.parallel_loss else "plain"]
            in_compute = self.setup.itemsize + (WIDE if self.setup.itemsize < WIDE else 0)  # as made, and widened
            yield "loss", self._of_loss(begun, in_compute + WIDE * (1 + forward))

    def _of_loss(self, begun: bool, bytes_a_logit: float) -> dict[str, float]:
        setup, head = self.setup, self.setup.head
        kept = self.of_blocks + self.of_head
        if setup.loss_pieces > 1:
            # The input of the output layer is still there, and the sum of the matrix's gradients is float32.
            kept += head.sizes[self._head_input] + self._output_matrix * (WIDE - setup.itemsize)
        return {
            "gathered_parameters": self.gathered(0 if setup.reshards else len(self.modes), self.stage.others),
            "gradients": self._before(begun),
            "activations": kept,
            "logits_and_loss": setup.logits / setup.loss_pieces * bytes_a_logit,
        }

    def _backward(self, begun: bool) -> Iterator[Parts]:
        if self.stage.last:
            yield from self._of_output_layer(begun)
        yield from self._blocks(begun)
        if self.stage.first:
            yield from self._embedding(begun)

    def _of_output_layer(self, begun: bool) -> Iterator[Parts]:
        setup, head = self.setup, self.setup.head
        _, copies = LOSS_COPIES["parallel" if setup.parallel_loss else "plain"]
        loss = self._of_loss(begun, WIDE * (1 + copies))
        loss["logits_and_loss"] += self.output
        yield "loss, backward", loss
        made = sum(self._made(unit) or (0.0 if begun else self._final(unit)) for unit in self._head_units)
        if setup.loss_pieces > 1:
            piece = (setup.logits / setup.loss_pieces + self._output_matrix) * setup.itemsize
            yield "loss, a piece's weights", {**loss, "logits_and_loss": piece}
            kept = self.of_blocks + self.of_head + self._of_pieces
            alive = {"gathered_parameters": loss["gathered_parameters"], "gradients": self._before(begun) + made}
            yield "output layer, backward", {**alive, "activations": kept}
            return
        walk = head.backward_peak(head.everything, 0.0) - head.sizes[head.trace.gives]
        yield (
            "output layer, backward",
            {
                **loss,
                "gradients": self._before(begun) + made,
                "activations": self.of_blocks + walk,
                "logits_and_loss": setup.logits * setup.itemsize + self.output,
            },
        )

    def _blocks(self, begun: bool) -> Iterator[Parts]:
        setup, block = self.setup, self.setup.block
        done = self._before(begun)
        if not begun or self._ties:
            done += sum(map(self._made if self._ties else self._final, self._head_units))
        gone = list(accumulate(self.kept[mode] for mode in reversed(self.modes)))
        added = begun and not setup.is_wrapped
        walk = block.backward_peak(block.everything | {"x"}, setup.itemsize, added)
        final, count = 0.0 if begun else self._final(self.stage.block), len(self.modes)
        sent = self._sent(self.stage.block)
        ends = sorted({0, 1, count - 2, count - 1} & set(range(count)))
        for number in ends if len(self.kept) == 1 else range(count):  # alike ones lie between
            kept = self.output + self.of_blocks - gone[number]
            alive = {"gathered_parameters": self.gathered(count - number, self._first_units)}
            waiting = sent if number or self._ties else sum(map(self._sent, self._head_units))
            yield (
                f"block {count - 1 - number}, backward",
                {
                    **alive,
                    "gradients": done + number * final,
                    "reduction": waiting,
                    "activations": kept + walk,
                },
            )
            yield (
                f"block {count - 1 - number}, reduction",
                {
                    **alive,
                    "gradients": done + (number + 1) * final + self._made(self.stage.block),
                    "reduction": sent,
                    "activations": kept + block.sizes["x"],
                },
            )

    def _embedding(self, begun: bool) -> Iterator[Parts]:
        if not self.stage.others:
            return
        embedding = self.stage.others[0]
        made = self._made(embedding) if not begun or self.setup.is_wrapped else 0.0
        done = self.final if begun else self.final - self._final(embedding)
        final = self._final(embedding) if not made or not begun else 0.0
        yield (
            "embedding, backward",
            {
                "gathered_parameters": self.together or 0.0,
                "gradients": done + made + final,
                "reduction": max(self._sent(self.stage.block), self._sent(embedding)),
                "activations": self.output + self.x,
            },
        )

    # --- a backward pass in two parts --------------------------------------------------------------------------------

    def _of_inputs(self, begun: bool) -> Iterator[Parts]:
        """Gradients of inputs alone: nothing is let go, and gradients of what each weight gives stay for the rest."""
        block, head = self.setup.block, self.setup.head
        kept = self.of_blocks + self.of_head
        together, before = self.gathered(len(self.modes), self.stage.others), self._before(begun)
        alive = {"gathered_parameters": together, "gradients": before}
        if self.stage.last:
            _, copies = LOSS_COPIES["parallel" if self.setup.parallel_loss else "plain"]
            loss = self.setup.logits * WIDE * (1 + copies) + self.output
            yield "loss, backward", {**alive, "activations": kept, "logits_and_loss": loss}
        of_head = head.weighted if self.stage.last else self.output
        for number in sorted({0, len(self.modes) - 1} & set(range(len(self.modes)))):
            walk = number * block.weighted + block.inputs_peak
            yield f"block {len(self.modes) - 1 - number}, inputs", {**alive, "activations": kept + of_head + walk}

    def _of_weights(self, begun: bool) -> Iterator[Parts]:
        """Gradients of weights: each unit's activations go as they are made, and wrapped ones wait for each other."""
        left = self.left_by_inputs + self.x + (0.0 if self.stage.last else self.output)
        alive = {"gathered_parameters": self.gathered(len(self.modes), self.stage.others)}
        matrix = self.setup.itemsize * self.stage.block.largest(self.tp, 1)
        yield (
            "weights, first",
            {
                **alive,
                "gradients": self._before(begun),
                "reduction": matrix if begun or self.setup.is_wrapped else self._final(self.stage.block),
                "activations": self.of_blocks + self.of_head + left,
            },
        )
        made = sum(count * self._made(unit) for unit, count in self.stage.units())
        alive["gradients"] = self.final
        yield "weights, last", {**alive, "reduction": made}
