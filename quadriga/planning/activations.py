"""Bytes that a forward pass saves for the backward pass, and that the backward pass needs in addition.

They are computed from the trace that the model declares (`models.operations`): which values an operation saves, which
of them a recompute mode or the compiler drops, and how many bytes of each a rank holds. Counts of eager blocks are
exact; a test compares them with the tensors of a real forward pass. For compiled blocks they are a model: the compiler
is assumed to recompute values that are cheap to compute from saved ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from quadriga.config.model_spec import ModelSpec
from quadriga.models.operations import Cut, Kernels, Operation, Trace, Value

FLOAT32_BYTES = 4
SAVED_KINDS = ("attention", "scatter", "exchange")  # by recompute per operation, besides every second product
WEIGHTED = ("product", "norm")  # kinds with parameters
RECOMPUTABLE_KINDS = ("cheap", "norm")  # the compiler recomputes these if that saves memory


@dataclass(frozen=True)
class LocalSizes:
    """One rank's part of a micro-batch: number of `tokens`, `itemsize` of the compute dtype in bytes, and the cuts."""

    tokens: int
    itemsize: int
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = True

    def size(self, value: Value) -> float:
        """Bytes of a value on this rank."""
        tokens = {
            "hidden": self.tokens / (self.tp if self.sequence_parallel else 1),
            "whole": self.tokens,
            "features": self.tokens / self.tp,
            "sequence": self.tokens * self.cp / self.tp,
        }[value.spread]
        return tokens * value.width * (FLOAT32_BYTES if value.float32 else self.itemsize)


class Activations:
    """Sizes of one trace on one rank."""

    def __init__(self, trace: Trace, local_sizes: LocalSizes) -> None:
        self.trace, self.local_sizes = trace, local_sizes
        self.sizes: Mapping[str, float] = {name: local_sizes.size(value) for name, value in trace.values.items()}
        self.all_saved = frozenset(name for operation in trace.operations for name in operation.saved)

    def bytes(self, names: Iterable[str]) -> float:
        return sum(self.sizes[name] for name in names)

    @cached_property
    def weighted_outputs(self) -> float:
        """Bytes of the outputs of the operations that have weights."""
        return self.bytes(each.output for each in self.trace.operations if each.kind in WEIGHTED)

    @cache  # noqa: B019
    def kept(self, mode: str, compiled: bool, forced: frozenset[tuple[int, int]] = frozenset()) -> frozenset[str]:
        """Names of the values that are saved by the forward pass.

        `mode`: `none`, `full` or `op`. `forced`: shapes (in, out) of products that `op` always recomputes.
        """
        if mode == "full":
            return frozenset({"x"})
        if mode == "op":
            return frozenset({"x", *self._kept_per_operation(forced)})
        return self._without_recomputable(self.all_saved) if compiled else self.all_saved

    def _kept_per_operation(self, forced: frozenset[tuple[int, int]]) -> Iterable[str]:
        products = 0
        for operation in self.trace.operations:
            if operation.kind in SAVED_KINDS:
                yield from (operation.output, *operation.extra)
            elif operation.kind == "product" and operation.matrix not in forced:
                products += 1
                if products % 2 == 1:
                    yield operation.output

    def _without_recomputable(self, names: frozenset[str]) -> frozenset[str]:
        """Without values that can be recomputed from saved ones, or from inputs that take fewer bytes."""
        kept = set(names)
        for operation in reversed(self.trace.operations):
            made = kept.intersection((operation.output, *operation.extra))
            if operation.kind not in RECOMPUTABLE_KINDS or not made:
                continue
            small = {name for name in made if self.trace.values[name].width == 1}  # the statistics of a norm
            sources = set(operation.inputs) - kept
            if self.bytes(sources) < self.bytes(made - small):
                kept = (kept - (made - small)) | sources
        return frozenset(kept)

    @cache  # noqa: B019 - as many as `activations_of` keeps
    def backward_peak(self, alive: frozenset[str], weight_itemsize: float, accumulates: bool = False) -> float:
        """Peak bytes of a backward pass: values of `alive`, which it frees on the way, gradients of values, and
        gradients of its matrices at `weight_itemsize` bytes per element (0: they are allocated elsewhere).

        `accumulates`: each matrix's gradient is added to an existing one, and freed.
        """
        return _BackwardWalk(self, alive, weight_itemsize, accumulates).run()

    @cached_property
    def bwd_input_peak(self) -> float:
        """Peak bytes of a pass that computes only gradients of inputs, besides the saved values, which all stay.
        Gradients of the outputs of operations with weights also stay, for the gradients of weights."""
        return _BackwardWalk(self, frozenset(), 0.0, accumulates=False, keeps_output_grads=True).run()


@lru_cache(maxsize=256)
def activations_of(
    trace: Callable[[ModelSpec, Cut, Kernels], Trace],
    model: ModelSpec,
    cut: Cut,
    kernels: Kernels,
    local_sizes: LocalSizes,
) -> Activations:
    """The activations of one trace of a model. Cached: thousands of candidates of a search share few of them."""
    return Activations(trace(model, cut, kernels), local_sizes)


class _BackwardWalk:
    """Walks through a trace backward and records the peak of the bytes that are alive."""

    def __init__(
        self,
        activations: Activations,
        alive: frozenset[str],
        weight_itemsize: float,
        accumulates: bool,
        keeps_output_grads: bool = False,
    ) -> None:
        self._all, self._alive, self._weight, self._accumulates = activations, set(alive), weight_itemsize, accumulates
        self._keeps_output_grads, self._kept = keeps_output_grads, 0.0
        self._gradients = {activations.trace.output: activations.sizes[activations.trace.output]}
        self._weights = 0.0
        self._first_use = {}
        for operation in reversed(activations.trace.operations):
            self._first_use.update(dict.fromkeys(operation.saved, operation))
        self.peak = self._alive_bytes()

    def _alive_bytes(self) -> float:
        return self._all.bytes(self._alive) + sum(self._gradients.values()) + self._weights + self._kept

    def run(self) -> float:
        for operation in reversed(self._all.trace.operations):
            self._step_through(operation)
        return self.peak

    def _step_through(self, operation: Operation) -> None:
        sizes, local_sizes = self._all.sizes, self._all.local_sizes
        given = self._gradients.pop(operation.output, 0.0)
        if operation.kind == "add":  # both inputs get the same gradient, in one tensor
            one, other = operation.inputs
            self._gradients[one] = self._gradients.get(one, 0.0) + given
            self._gradients.setdefault(other, 0.0)
        else:
            made = [sizes[name] for name in operation.inputs]
            if operation.matrix is not None:
                self._weights += self._weight * operation.matrix[0] * operation.matrix[1] / local_sizes.tp
            # A norm that is not one kernel works on copies.
            unscaled = [name for name in operation.extra if "unscaled" in name and operation.kind == "norm"]
            temporary = 3 * self._all.bytes(unscaled)
            self.peak = max(self.peak, self._alive_bytes() + given + sum(made) + temporary)
            if self._keeps_output_grads and operation.kind in WEIGHTED:
                self._kept += sizes[operation.output]
            if self._accumulates:
                self._weights = 0.0
            for name, size in zip(operation.inputs, made, strict=True):
                self._gradients[name] = max(self._gradients.get(name, 0.0), size)
        self._alive -= {name for name in operation.saved if self._first_use[name] is operation}
        self.peak = max(self.peak, self._alive_bytes())
