"""What a part of a model computes, operation by operation: declared by the model, priced by `estimate`. No torch here.

A `Value` is a tensor that operations take and give. Its size is said per token, of the whole model; how much of it one
rank holds follows from its `spread`:

| spread     | one rank holds                                                                          |
|------------|-----------------------------------------------------------------------------------------|
| `hidden`   | its tokens; with sequence parallelism a tensor-parallel part of them                    |
| `whole`    | its tokens, all numbers of each, also where matrices are cut                            |
| `features` | its tokens, a tensor-parallel part of each one's numbers                                |
| `sequence` | the tokens of all context-parallel ranks, a tensor-parallel part of each one's numbers  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """`width`: numbers a token. `float32`: whatever the computing dtype is."""

    width: float
    spread: str = "features"
    float32: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass.

    `kind`: product (of a matrix, `matrix` is (in, out) and `module` its name), attention, norm, add (of two streams),
    cheap (by element), gather, scatter and reduce (over tensor-parallel ranks), gather_keys and exchange (over
    context-parallel ranks). `inputs` and `output` name values; `saved` those that the backward pass needs,
    of both and of earlier ones. `extra`: values that come beside the result and serve the backward pass alone.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    saved: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    matrix: tuple[int, int] | None = None
    module: str = ""


@dataclass(frozen=True)
class Trace:
    """The operations of a part of the model in the order of the forward pass. Takes the value `x`."""

    values: Mapping[str, Value]
    operations: tuple[Operation, ...]
    output: str


@dataclass
class Tracer:
    """Writes a trace down: each method adds an operation and returns the name of what it gives."""

    values: dict[str, Value]
    operations: list[Operation] = field(default_factory=list)

    def add(
        self,
        name: str,
        value: Value,
        kind: str,
        inputs: tuple[str, ...],
        saved: tuple[str, ...] = (),
        extra: Mapping[str, Value] | None = None,
        matrix: tuple[int, int] | None = None,
        module: str = "",
    ) -> str:
        self.values[name] = value
        self.values.update(extra or {})
        self.operations.append(Operation(kind, inputs, name, saved, tuple(extra or ()), matrix, module))
        return name

    def trace(self, output: str) -> Trace:
        return Trace(self.values, tuple(self.operations), output)


@dataclass(frozen=True)
class Kernels:
    """What differs from machine to machine in the operations that a model is made of.

    `attention`: flash (CUDA, halves), efficient (CUDA, float32: heads of keys and values are repeated), cpu (which
    works in float32). `fused_norm`: one kernel that keeps its input; otherwise several steps, each with its result.
    `half`: whether the computing dtype is narrower than float32.
    """

    attention: str
    fused_norm: bool
    half: bool

    @classmethod
    def of(cls, device_type: str, dtype: str) -> Kernels:
        """Of `cpu` or `cuda` (ROCm's too), computing in `dtype`."""
        half = dtype != "float32"
        if device_type == "cpu":
            return cls("cpu", fused_norm=False, half=half)
        return cls("flash" if half else "efficient", fused_norm=True, half=half)


@dataclass(frozen=True)
class Cut:
    """How the operations of a block are spread: tensor-parallel at all, with its sequence between the matrices; and
    the method of context parallelism, None where there is none."""

    tensor: bool = False
    sequence: bool = False
    context: str | None = None
