"""How a model can be sharded: declared by the model, applied by `parallel`, used by `estimate`. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: full name, shape, and its initial values: `ones`, or `normal` with mean 0.

    `std`: the standard deviation of the normal distribution before truncation.
    `bound`: the truncation: all initial values are in [-bound, bound]. inf: no truncation.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"  # normal | ones
    std: float = 0.02
    bound: float = math.inf


@dataclass(frozen=True)
class ShardUnit:
    """Modules whose parameters are all-gathered, and whose gradients are reduce-scattered, together.

    `reshard=False`: the weights stay gathered from forward to backward."""

    modules: tuple[str, ...]  # fully qualified module names; () is the root, with the remaining parameters
    reshard: bool = True
    weights_in_backward: bool = True  # False: its gradients do not need its weights (a lookup), so gather only once


@dataclass(frozen=True)
class TensorCut:
    """The tensor parallelism of one module (fully qualified name). Between the modules below, hidden states are sharded
    along the sequence (sequence parallelism) or, without it, replicated.

    | style     | weight             | input                        | output                                    |
    |-----------|--------------------|------------------------------|-------------------------------------------|
    | embedding | sharded by rows    | token ids, replicated        | hidden states                             |
    | norm      | replicated         | hidden states                | hidden states                             |
    | gather    | none               | hidden states                | the same, gathered, for its child modules |
    | columns   | sharded by rows    | hidden states, gathered      | a shard of the features                   |
    | rows      | sharded by columns | a shard of the features      | hidden states, summed over the ranks      |
    | logits    | sharded by rows    | hidden states                | a shard of the vocabulary                 |

    (The weight of a linear layer is (out, in), so a shard of its output features is a shard of its rows.)
    """

    module: str
    style: str


@dataclass(frozen=True)
class ParallelPlan:
    """The parallelism that a model supports.

    `parameters`: every parameter, in the order of `named_parameters()`, tied ones once.
    `shard_units`: in the order of the forward pass, the root last.
    `recompute_units`: modules whose forward can be recomputed in the backward pass (the blocks), in order.
    `tensor_cuts`: in the order of the forward pass.
    `attention_units`: modules that map (q, k, v), each (batch, heads, seq, head_dim), to causal attention over the
    whole sequence. Context parallelism replaces them, because they need other ranks' tokens.
    `stage_units`: the modules of pipeline stages, in the order of the forward pass; a stage is a range of them.
    `logits_unit`: the last module. It computes the logits of each token from its hidden state and from `weight`, its
    own or that of another module, and from nothing else. None in a part without it.
    """

    parameters: tuple[ParameterPlan, ...]
    shard_units: tuple[ShardUnit, ...]
    recompute_units: tuple[str, ...]
    tensor_cuts: tuple[TensorCut, ...] = ()
    attention_units: tuple[str, ...] = ()
    stage_units: tuple[str, ...] = ()
    logits_unit: str | None = None

    def of_stage(self, modules: tuple[str, ...]) -> ParallelPlan:
        """The plan of a part of the model: of `modules`, a subset of `stage_units`, and their submodules."""

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
    """Splits `plan.stage_units` into `count` ranges of similar cost: the modules of each pipeline stage.

    Each stage gets an equal share of the layers (`recompute_units`). The modules before the first layer count as
    `first_less` layers and those after the last as `last_less`: the first and the last stage get so many layers less.
    Of a remainder, the first stages get one layer each.

    Raises:
        ValueError: `first_less` or `last_less` exceeds a stage's share, or there are more stages than layers, including
            these two.
    """
    layers = [unit for unit in plan.stage_units if unit in plan.recompute_units]
    begin, end = plan.stage_units.index(layers[0]), plan.stage_units.index(layers[-1]) + 1
    shares = stage_shares(len(layers), count, first_less, last_less)
    if min(shares) < 0:
        raise ValueError(f"{len(layers)} layers cannot be split into {count} stages: the shares would be {shares}")
    stages, done = [], begin
    for share in shares:
        stages.append(plan.stage_units[done : done + share])
        done += share
    stages[0] = (*plan.stage_units[:begin], *stages[0])
    stages[-1] = (*stages[-1], *plan.stage_units[end:])
    return tuple(stages)


def stage_shares(layers: int, count: int, first_less: int, last_less: int) -> tuple[int, ...]:
    """Layers of each of `count` stages; negative if `first_less` or `last_less` exceeds a stage's share."""
    each, more = divmod(layers + first_less + last_less, count)
    shares = [each + (stage < more) for stage in range(count)]
    shares[0] -= first_less
    shares[-1] -= last_less
    return tuple(shares)
