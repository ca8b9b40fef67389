"""How a model may be cut: declared by the model, applied by `parallel`, priced by `estimate`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: full name, shape, and how it is born (`normal` with `std`, truncated at 3 std, or `ones`)."""

    name: str
    shape: tuple[int, ...]
    init: str = "normal"  # normal | ones
    std: float = 0.02


@dataclass(frozen=True)
class ShardUnit:
    """Modules whose parameters are gathered and reduced together. `reshard=False`: whole from forward to backward."""

    modules: tuple[str, ...]  # fully qualified module names; () is the root, which takes what is left
    reshard: bool = True
    weights_in_backward: bool = True  # False: its gradients do not depend on its weights (a lookup), gather them once


@dataclass(frozen=True)
class ParallelPlan:
    """The cuts that a model allows.

    `parameters`: every parameter, in the order of `named_parameters()`, tied ones once.
    `shard_units`: in the order of the forward pass, the root last.
    `recompute_units`: modules whose forward may be repeated in the backward pass (the blocks), in order.
    """

    parameters: tuple[ParameterPlan, ...]
    shard_units: tuple[ShardUnit, ...]
    recompute_units: tuple[str, ...]
