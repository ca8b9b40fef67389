"""The operations of a part of a model: declared by the model, used by `estimate` for memory and time. No torch here.

A `Value` is a tensor that operations read and write. Its size is given per token of the whole model. The part that one
rank holds follows from its `spread`:

| spread     | one rank holds                                                                            |
|------------|-------------------------------------------------------------------------------------------|
| `hidden`   | its tokens; with sequence parallelism, a tensor-parallel part of them                     |
| `whole`    | its tokens, all features of each, also if matrices are sharded                            |
| `features` | its tokens, a tensor-parallel part of the features of each                                |
| `sequence` | the tokens of all context-parallel ranks, a tensor-parallel part of the features of each  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """`width`: elements per token. `float32`: the tensor is float32 for every computing dtype."""

    width: float
    spread: str = "features"
    float32: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass.

    `kind`: product (matrix product; `matrix` is (in, out), `module` its name), attention, norm, add (of two tensors),
    cheap (elementwise), gather, scatter and reduce (over tensor-parallel ranks), gather_keys and exchange (over
    context-parallel ranks). `inputs` and `output` are names of values. `saved`: the values that the backward pass
    needs, among these and earlier ones. `extra`: additional results that only the backward pass needs.
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
    """The operations of a part of the model, in the order of the forward pass. The input is the value `x`."""

    values: Mapping[str, Value]
    operations: tuple[Operation, ...]
    output: str


@dataclass
class Tracer:
    """Builds a trace: `add` appends an operation and returns the name of its output."""

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
    """The kernels of a machine, as far as they change the operations of a model.

    `attention`: flash (CUDA, half precision), efficient (CUDA, float32; heads of keys and values are repeated), cpu
    (computes in float32). `fused_norm`: one kernel that saves its input; otherwise several operations, each with its
    own result. `half`: whether the computing dtype is narrower than float32.
    """

    attention: str
    fused_norm: bool
    half: bool

    @classmethod
    def of(cls, device_type: str, dtype: str) -> Kernels:
        """The kernels of `cpu` or `cuda` (also ROCm) that compute in `dtype`."""
        half = dtype != "float32"
        if device_type == "cpu":
            return cls("cpu", fused_norm=False, half=half)
        return cls("flash" if half else "efficient", fused_norm=True, half=half)


@dataclass(frozen=True)
class Cut:
    """How the operations of a block are distributed. `tensor`: with tensor parallelism. `sequence`: with sequence
    parallelism. `context`: the method of context parallelism, None without it."""

    tensor: bool = False
    sequence: bool = False
    context: str | None = None
