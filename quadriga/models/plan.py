"""How a model may be cut: declared by the model, applied by `parallel`, priced by `estimate`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
class TensorCut:
    """What tensor parallelism makes of one module (fully qualified name). Between modules of the styles below, hidden
    states are cut along the sequence (sequence parallelism) or, without it, whole and the same on all ranks.

    | style     | its weight   | takes                        | gives                                 |
    |-----------|--------------|------------------------------|---------------------------------------|
    | embedding | cut by rows  | token ids, whole             | hidden states                         |
    | norm      | whole        | hidden states                | hidden states                         |
    | gather    | none         | hidden states                | hands them to its children, whole     |
    | columns   | cut by rows  | hidden states, whole         | its slice of the features             |
    | rows      | cut by columns | its slice of the features  | hidden states, summed over the ranks  |
    | logits    | cut by rows  | hidden states                | its slice of the vocabulary           |

    (A linear layer's weight is (out, in): a slice of the features that it gives is a slice of its rows.)
    """

    module: str
    style: str


@dataclass(frozen=True)
class ParallelPlan:
    """The cuts that a model allows.

    `parameters`: every parameter, in the order of `named_parameters()`, tied ones once.
    `shard_units`: in the order of the forward pass, the root last.
    `recompute_units`: modules whose forward may be repeated in the backward pass (the blocks), in order.
    `tensor_cuts`: in the order of the forward pass.
    `attention_units`: modules that map (q, k, v), each (batch, heads, seq, head_dim), to causal attention over the
    whole sequence: where context parallelism must look beyond its own part.
    `stage_units`: what a pipeline may cut between, in the order of the forward pass; a stage is a range of it.
    """

    parameters: tuple[ParameterPlan, ...]
    shard_units: tuple[ShardUnit, ...]
    recompute_units: tuple[str, ...]
    tensor_cuts: tuple[TensorCut, ...] = ()
    attention_units: tuple[str, ...] = ()
    stage_units: tuple[str, ...] = ()

    def of_stage(self, modules: tuple[str, ...]) -> ParallelPlan:
        """The plan of a part of the model: of what lies within `modules`, some of `stage_units`."""

        def held(name: str) -> bool:
            return any(name == module or name.startswith(f"{module}.") for module in modules)

        return ParallelPlan(
            parameters=tuple(each for each in self.parameters if held(each.name)),
            shard_units=tuple(
                replace(unit, modules=kept)
                for unit in self.shard_units
                if (kept := tuple(filter(held, unit.modules))) or not unit.modules
            ),
            recompute_units=tuple(filter(held, self.recompute_units)),
            tensor_cuts=tuple(cut for cut in self.tensor_cuts if held(cut.module)),
            attention_units=tuple(filter(held, self.attention_units)),
            stage_units=tuple(unit for unit in self.stage_units if unit in modules),
        )
