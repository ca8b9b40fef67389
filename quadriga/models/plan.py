"""How a model may be cut: declared by the model, applied by `parallel`, priced by `estimate`. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: full name, shape, and its initial values: `ones`, or `normal` with mean 0.

    `std`: the standard deviation of the normal distribution before it is cut.
    `bound`: where it is cut, as an absolute value: all initial values lie in [-bound, bound]. inf: not cut.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"  # normal | ones
    std: float = 0.02
    bound: float = math.inf


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
    `logits_unit`: the module that makes logits of hidden states, token by token, from a `weight` of its own or borrowed
    and from nothing else; it comes last. None in a part without it.
    """

    parameters: tuple[ParameterPlan, ...]
    shard_units: tuple[ShardUnit, ...]
    recompute_units: tuple[str, ...]
    tensor_cuts: tuple[TensorCut, ...] = ()
    attention_units: tuple[str, ...] = ()
    stage_units: tuple[str, ...] = ()
    logits_unit: str | None = None

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
            logits_unit=self.logits_unit if self.logits_unit and held(self.logits_unit) else None,
        )


def split_stages(plan: ParallelPlan, count: int, first_less: int, last_less: int) -> tuple[tuple[str, ...], ...]:
    """Cut `plan.stage_units` into `count` ranges that take about as long: the modules of each pipeline stage.

    A stage gets its share of the layers (`recompute_units`). What stands before the first layer counts as `first_less`
    layers and what follows the last as `last_less`: the first and the last stage get so many layers less. What does not
    divide goes to the first stages, one layer each.

    Raises:
        ValueError: an end weighs more than a stage, or there are more stages than layers and weights together.
    """
    layers = [unit for unit in plan.stage_units if unit in plan.recompute_units]
    begin, end = plan.stage_units.index(layers[0]), plan.stage_units.index(layers[-1]) + 1
    shares = stage_shares(len(layers), count, first_less, last_less)
    if min(shares) < 0:
        raise ValueError(f"{len(layers)} layers cannot be cut into {count} stages: the shares would be {shares}")
    stages, done = [], begin
    for share in shares:
        stages.append(plan.stage_units[done : done + share])
        done += share
    stages[0] = (*plan.stage_units[:begin], *stages[0])
    stages[-1] = (*stages[-1], *plan.stage_units[end:])
    return tuple(stages)


def stage_shares(layers: int, count: int, first_less: int, last_less: int) -> tuple[int, ...]:
    """Layers of each of `count` stages; below 0 at an end that weighs more than a stage."""
    each, more = divmod(layers + first_less + last_less, count)
    shares = [each + (stage < more) for stage in range(count)]
    shares[0] -= first_less
    shares[-1] -= last_less
    return tuple(shares)
