"""Bytes of one pass through a stage at each of its moments.

The moments are the loss, the backward pass of the output layer, of each block and of the embedding, and the reductions
between them. A run without a pipeline is one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from quadriga.planning.activations import FLOAT32_BYTES
from quadriga.planning.parameters import Stage, Unit
from quadriga.planning.setup import Setup

# Temporary float32 elements of the loss per logit, besides those that it saves: forward pass, backward pass.
LOSS_COPIES = {"plain": (0, 2), "eager on CPU": (0, 1), "parallel": (1, 3)}
NamedBytes = tuple[str, dict[str, float]]  # name of a moment, and bytes alive by kind


@dataclass(frozen=True)
class PassSnapshot:
    """One moment of a pass: bytes of the pass and of its stage's gradients, by kind and in total."""

    name: str
    by_kind: Mapping[str, float]

    @cached_property
    def total(self) -> float:
        return sum(self.by_kind.values())


class StagePasses:
    """Memory of the passes through one stage.

    `unsharded_bytes`: of parameters that a pipeline keeps gathered; None if each unit is gathered separately. `modes`:
    recompute mode of each block.
    """

    def __init__(self, setup: Setup, stage: Stage, unsharded_bytes: float | None, modes: tuple[str, ...]) -> None:
        self.setup, self.stage, self.unsharded_bytes = setup, stage, unsharded_bytes
        self.tp, self.shards = setup.degrees.tp, setup.shards
        self.modes, self.loss_chunks = modes, setup.run.config.training.loss_chunks
        on_cpu = setup.device_type == "cpu" and not setup.run.config.compile.compiles("loss")
        kind = "parallel" if setup.parallel_loss else "eager on CPU" if on_cpu else "plain"
        self.loss_copies = LOSS_COPIES[kind]
        self.kept = {mode: setup.block.bytes(setup.kept(mode)) for mode in set(self.modes)}
        self.x = setup.block.sizes["x"]
        output_layer = setup.head.trace.operations[-1]
        self._head_input, matrix = output_layer.inputs[0], output_layer.matrix
        assert matrix is not None
        self._output_matrix = matrix[0] * matrix[1] // self.tp  # elements on this rank
        # If one unit is at both ends, it stays gathered, with unreduced gradients, during all blocks.
        self._is_tied = stage.first and stage.last and len(stage.others) == 1
        self._head_units = stage.others[-1:] if stage.last else ()
        self._first_units = tuple(unit for unit in stage.others if self._is_tied or unit not in self._head_units)
        self._snapshots = dict[tuple[str, bool], tuple[PassSnapshot, ...]]()

    # --- saved until the backward pass -------------------------------------------------------------------------------

    @cached_property
    def held_until_backward(self) -> float:
        """Bytes that a forward pass saves, including the log-probabilities of the loss."""
        whole = self.setup.logits * FLOAT32_BYTES if self.stage.last and self.loss_chunks == 1 else 0.0
        return self.block_activations + self.head_activations + self.output + whole

    @cached_property
    def block_activations(self) -> float:
        """Bytes that the blocks save, without the first block's input if that is in the receive buffer."""
        is_received = not self.stage.first and self.modes and "x" in self.setup.kept(self.modes[0])
        return sum(self.kept[mode] for mode in self.modes) - (self.x if is_received else 0.0)

    @cached_property
    def output(self) -> float:
        """Bytes of the stage's output, which a pipeline keeps: sent hidden states, or logits."""
        if self.setup.degrees.pp == 1:
            return 0.0
        return self.setup.logits * self.setup.itemsize if self.stage.last else self.x

    @cached_property
    def head_activations(self) -> float:
        """Saved bytes of the last norm and the output layer. A chunked loss saves gradients instead of the input."""
        head = self.setup.head
        if self.stage.last and self.loss_chunks > 1:
            return head.bytes(head.all_saved - {self._head_input}) + self._loss_chunk_grads
        return head.bytes(head.all_saved) if self.stage.last else 0.0

    @property
    def _loss_chunk_grads(self) -> float:
        """Bytes of the gradients that a chunked loss computes: of the hidden states and of the output matrix."""
        return self.setup.head.sizes[self._head_input] + self._output_matrix * self.setup.itemsize

    @cached_property
    def held_until_wgrad(self) -> float:
        """Bytes held between the two parts of a split backward pass: the output gradient of every layer with weights.

        The gradient of the stage's output is the received one and is not counted. Loss and logits are freed.
        """
        blocks = len(self.modes) * self.setup.block.weighted_outputs
        if not self.stage.last:
            return blocks - self.x
        return blocks + self.setup.head.weighted_outputs - self.output - self.setup.logits * FLOAT32_BYTES

    # --- parameters and their gradients ------------------------------------------------------------------------------

    def gathered(self, blocks: int, ends: tuple[Unit, ...]) -> float:
        """Bytes of gathered parameters while `blocks` blocks and the units `ends` still need their backward pass.

        With resharding: the parameters of the running block, and of those before it that are prefetched if there are
        other ranks. A pipeline keeps all parameters gathered until its last micro-batch.
        """
        if self.unsharded_bytes is not None:
            return self.unsharded_bytes
        setup, one = self.setup, self.setup.gathered(self.stage.block)
        if setup.reshards:
            ahead = min(setup.prefetch, max(blocks - 1, 0)) if setup.shards > 1 else 0
            kept = sum(setup.gathered(unit) for unit in ends if not unit.reshard)
            return kept + one * (min(blocks, 1) + ahead)
        return blocks * one + sum(map(setup.gathered, ends))

    def _unreduced_grads(self, unit: Unit) -> float:
        """Bytes of a unit's gradients before reduction: unsharded, in the compute dtype; 0 without `fully_shard`."""
        return self.setup.itemsize * unit.whole(self.tp) if self.setup.uses_fsdp else 0.0

    def _final_grads(self, unit: Unit) -> float:
        """Bytes of a unit's gradients that stay on the device until the update."""
        if self.setup.keeps_unsharded_grads:
            return self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
        return 0.0 if self.setup.offload else self.setup.parameter_bytes * unit.held(self.tp, self.shards)

    def _reduction_buffer(self, unit: Unit) -> float:
        """Bytes of the send buffer of a unit's reduction."""
        whole = self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
        return whole if self.setup.uses_fsdp and not self.setup.keeps_unsharded_grads else 0.0

    @cached_property
    def final_grads(self) -> float:
        """Bytes of the gradients of the whole stage until the update."""
        return sum(count * self._final_grads(unit) for unit, count in self.stage.units())

    @property
    def reduction_bytes(self) -> float:
        """Peak bytes of reducing unsharded gradients: send buffer and result of the largest unit. Without tensor
        parallelism, the gradients are freed as soon as they are copied. One rank copies them once."""
        several = self.shards * self.setup.degrees.dp_replicate > 1

        def of(unit: Unit) -> float:
            sent = self.setup.reduce_bytes * unit.gathered(self.tp, self.shards)
            back = self.setup.parameter_bytes * unit.held(self.tp, self.shards)
            return sent + back if self.tp > 1 and several else max(sent, back)

        return max((of(unit) for unit, _ in self.stage.units()), default=0.0)

    # --- moments -----------------------------------------------------------------------------------------------------

    def snapshots(self, kind: str, has_weight_grads: bool) -> tuple[PassSnapshot, ...]:
        """The moments of an action: F forward, B backward, I and W the two parts of a backward pass.

        `has_weight_grads`: gradients of the stage's parameters exist already.
        """
        if (kind, has_weight_grads) not in self._snapshots:
            self._snapshots[kind, has_weight_grads] = tuple(
                PassSnapshot(name, {key: size for key, size in by_kind.items() if size})
                for name, by_kind in self._named_bytes(kind, has_weight_grads)
            )
        return self._snapshots[kind, has_weight_grads]

    def _named_bytes(self, kind: str, has_weight_grads: bool) -> Iterator[NamedBytes]:
        """The first stage needs no gradients of its input, so its whole backward pass is in the second part (W)."""
        if kind == "F" and self.stage.last:
            cast = FLOAT32_BYTES if self.setup.itemsize < FLOAT32_BYTES else 0
            bytes_per_logit = self.setup.itemsize + cast + FLOAT32_BYTES * (1 + self.loss_copies[0])
            yield "loss", self._loss_bytes(has_weight_grads, bytes_per_logit)
        elif kind == "B" or (kind == "W" and self.stage.first):
            yield from self._backward(has_weight_grads)
        elif kind == "I" and not self.stage.first:
            yield from self._bwd_inputs(has_weight_grads)
        elif kind == "W":
            yield from self._bwd_weights(has_weight_grads)

    def _existing_grads(self, has_weight_grads: bool) -> float:
        """Bytes of existing gradients of parameters."""
        return self.final_grads if has_weight_grads else 0.0

    def _loss_bytes(self, has_weight_grads: bool, bytes_per_logit: float) -> dict[str, float]:
        setup, head = self.setup, self.setup.head
        kept = self.block_activations + self.head_activations
        if self.loss_chunks > 1:
            # The input of the output layer still exists, and the matrix's gradients are accumulated in float32.
            kept += head.sizes[self._head_input] + self._output_matrix * (FLOAT32_BYTES - setup.itemsize)
        return {
            "gathered_parameters": self.gathered(0 if setup.reshards else len(self.modes), self.stage.others),
            "gradients": self._existing_grads(has_weight_grads),
            "activations": kept,
            "logits_and_loss": setup.logits / self.loss_chunks * bytes_per_logit,
        }

    def _backward(self, has_weight_grads: bool) -> Iterator[NamedBytes]:
        if self.stage.last:
            yield from self._output_layer(has_weight_grads)
        yield from self._blocks(has_weight_grads)
        if self.stage.first and self.stage.others:
            yield from self._embedding(has_weight_grads)

    def _output_layer(self, has_weight_grads: bool) -> Iterator[NamedBytes]:
        setup, head = self.setup, self.setup.head
        loss = self._loss_bytes(has_weight_grads, FLOAT32_BYTES * (1 + self.loss_copies[1]))
        loss["logits_and_loss"] += self.output
        yield "loss, backward", loss
        made = 0.0
        for unit in self._head_units:
            made += self._unreduced_grads(unit) or (0.0 if has_weight_grads else self._final_grads(unit))
        if self.loss_chunks > 1:
            chunk = (setup.logits / self.loss_chunks + self._output_matrix) * setup.itemsize
            yield "loss, weights of a chunk", {**loss, "logits_and_loss": chunk}
            kept = self.block_activations + self.head_activations + self._loss_chunk_grads
            alive = {"gathered_parameters": loss["gathered_parameters"], "gradients": loss["gradients"] + made}
            yield "output layer, backward", {**alive, "activations": kept}
            return
        walk = head.backward_peak(head.all_saved, 0.0) - head.sizes[head.trace.output]
        alive = {**loss, "gradients": loss["gradients"] + made, "activations": self.block_activations + walk}
        yield "output layer, backward", {**alive, "logits_and_loss": setup.logits * setup.itemsize + self.output}

    def _blocks(self, has_weight_grads: bool) -> Iterator[NamedBytes]:
        setup, block = self.setup, self.setup.block
        done = self._existing_grads(has_weight_grads)
        if not has_weight_grads or self._is_tied:
            done += sum(map(self._unreduced_grads if self._is_tied else self._final_grads, self._head_units))
        freed = list(accumulate(self.kept[mode] for mode in reversed(self.modes)))
        accumulates = has_weight_grads and not setup.uses_fsdp
        walk = block.backward_peak(block.all_saved | {"x"}, setup.itemsize, accumulates)
        final, count = 0.0 if has_weight_grads else self._final_grads(self.stage.block), len(self.modes)
        sent = self._reduction_buffer(self.stage.block)
        ends = sorted({0, 1, count - 2, count - 1} & set(range(count)))
        for number in ends if len(self.kept) == 1 else range(count):  # the blocks between are equal
            kept = self.output + self.block_activations - freed[number]
            alive = {"gathered_parameters": self.gathered(count - number, self._first_units)}
            waiting = sent if number or self._is_tied else sum(map(self._reduction_buffer, self._head_units))
            name, grads = f"block {count - 1 - number}", done + number * final
            yield f"{name}, backward", {**alive, "gradients": grads, "reduction": waiting, "activations": kept + walk}
            grads = done + (number + 1) * final + self._unreduced_grads(self.stage.block)
            kept += block.sizes["x"]
            yield f"{name}, reduction", {**alive, "gradients": grads, "reduction": sent, "activations": kept}

    def _embedding(self, has_weight_grads: bool) -> Iterator[NamedBytes]:

        embedding = self.stage.others[0]
        made = self._unreduced_grads(embedding) if not has_weight_grads or self.setup.uses_fsdp else 0.0
        done = self.final_grads if has_weight_grads else self.final_grads - self._final_grads(embedding)
        final = self._final_grads(embedding) if not made or not has_weight_grads else 0.0
        sent = max(self._reduction_buffer(self.stage.block), self._reduction_buffer(embedding))
        alive = {"gathered_parameters": self.unsharded_bytes or 0.0, "gradients": done + made + final}
        yield "embedding, backward", {**alive, "reduction": sent, "activations": self.output + self.x}

    # --- a split backward pass ---------------------------------------------------------------------------------------

    def _bwd_inputs(self, has_weight_grads: bool) -> Iterator[NamedBytes]:
        """Gradients of inputs only: nothing is freed, and output gradients of layers with weights stay for part W."""
        block, head = self.setup.block, self.setup.head
        kept = self.block_activations + self.head_activations
        gathered = self.gathered(len(self.modes), self.stage.others)
        alive = {"gathered_parameters": gathered, "gradients": self._existing_grads(has_weight_grads)}
        if self.stage.last:
            loss = self.setup.logits * FLOAT32_BYTES * (1 + self.loss_copies[1]) + self.output
            yield "loss, backward", {**alive, "activations": kept, "logits_and_loss": loss}
        of_head = head.weighted_outputs if self.stage.last else self.output
        for number in sorted({0, len(self.modes) - 1} & set(range(len(self.modes)))):
            walk = number * block.weighted_outputs + block.bwd_input_peak
            yield f"block {len(self.modes) - 1 - number}, inputs", {**alive, "activations": kept + of_head + walk}

    def _bwd_weights(self, has_weight_grads: bool) -> Iterator[NamedBytes]:
        """Gradients of weights: each frees activations. With `fully_shard`, unreduced gradients stay to the end."""
        held = self.held_until_wgrad + self.x + (0.0 if self.stage.last else self.output)
        alive = {"gathered_parameters": self.gathered(len(self.modes), self.stage.others)}
        matrix: float = self.setup.itemsize * self.stage.block.largest(self.tp, 1)
        if not has_weight_grads and not self.setup.uses_fsdp:
            matrix = self._final_grads(self.stage.block)
        kept, grads = self.block_activations + self.head_activations + held, self._existing_grads(has_weight_grads)
        yield "weights, first", {**alive, "gradients": grads, "reduction": matrix, "activations": kept}
        made = sum(count * self._unreduced_grads(unit) for unit, count in self.stage.units())
        alive["gradients"] = self.final_grads
        yield "weights, last", {**alive, "reduction": made}
