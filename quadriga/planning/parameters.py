"""The sharded parameters of a model: how many elements a rank holds, gathers and updates. Exact arithmetic.

Counts are elements, not bytes. They depend only on the two degrees that shard parameters (tp and shard), so that a
search over thousands of layouts computes each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

from quadriga.config.model_spec import ModelSpec
from quadriga.models.plan import ParallelPlan, ShardUnit, split_stages
from quadriga.models.registry import parallel_plan

# The dimension along which each style of tensor parallelism divides a weight; other styles replicate it.
SHARD_DIMENSION = {"embedding": 0, "columns": 0, "logits": 0, "rows": 1}


@dataclass(frozen=True)
class Weight:
    """One parameter: its full shape, the dimension that tensor parallelism shards (None if it is replicated), and the
    name of its module."""

    shape: tuple[int, ...]
    shard_dim: int | None
    module: str

    def local_shape(self, tp: int) -> tuple[int, ...]:
        return tuple(size // tp if axis == self.shard_dim else size for axis, size in enumerate(self.shape))

    def shard(self, tp: int, shards: int, rank: int) -> int:
        """Elements on shard rank `rank`: `fully_shard` divides the first dimension as `torch.chunk` does."""
        first, *rest = self.local_shape(tp)
        rows = -(-first // shards)
        return min(max(first - rank * rows, 0), rows) * prod(rest)

    def gathered(self, tp: int, shards: int) -> int:
        """Elements of the gathered parameter, with the padding rows of the last shards."""
        first, *rest = self.local_shape(tp)
        return -(-first // shards) * shards * prod(rest)


@dataclass(frozen=True, eq=False)  # compared by identity: one object per unit, which is a key of caches
class Unit:
    """Parameters that are gathered and reduced together. `reshard`: freed after the forward pass.
    `weights_in_backward`: the backward pass reads them. `is_block`: a repeated block, which may be recomputed."""

    weights: tuple[Weight, ...]
    reshard: bool
    weights_in_backward: bool
    is_block: bool

    @cache  # noqa: B019 - few units exist, and they live as long as the process
    def held(self, tp: int, shards: int, rank: int = 0) -> int:
        return sum(weight.shard(tp, shards, rank) for weight in self.weights)

    @cache  # noqa: B019
    def gathered(self, tp: int, shards: int) -> int:
        return sum(weight.gathered(tp, shards) for weight in self.weights)

    @cache  # noqa: B019
    def whole(self, tp: int) -> int:
        return sum(prod(weight.local_shape(tp)) for weight in self.weights)

    @cache  # noqa: B019
    def largest(self, tp: int, shards: int) -> int:
        return max((weight.shard(tp, shards, 0) for weight in self.weights), default=0)


@dataclass(frozen=True)
class Stage:
    """A range of the model. `blocks`: number of equal blocks. `others`: units before and after them."""

    first: bool
    last: bool
    blocks: int
    block: Unit
    others: tuple[Unit, ...]

    def units(self) -> tuple[tuple[Unit, int], ...]:
        """Each unit with its count."""
        return ((self.block, self.blocks), *((unit, 1) for unit in self.others))

    def held(self, tp: int, shards: int, rank: int = 0) -> int:
        return sum(count * unit.held(tp, shards, rank) for unit, count in self.units())


@lru_cache(maxsize=64)
def _plan(model: ModelSpec) -> ParallelPlan:
    return parallel_plan(model)


@lru_cache(maxsize=4096)
def even_split(model: ModelSpec, count: int, first_less: int, last_less: int) -> tuple[tuple[str, ...], ...]:
    """The modules of each of `count` stages; see `models.plan.split_stages`."""
    return split_stages(_plan(model), count, first_less, last_less)


@lru_cache(maxsize=4096)
def build_stages(model: ModelSpec, split: Sequence[tuple[str, ...]] | None) -> tuple[Stage, ...]:
    """The stages of a model. `split`: the modules of each; None: the whole model is one stage."""
    plan = _plan(model)
    parts = [plan.stage_units] if split is None else list(split)
    return tuple(_build_stage(plan, tuple(part), split is None) for part in parts)


def _build_stage(plan: ParallelPlan, modules: tuple[str, ...], whole: bool) -> Stage:
    own = plan if whole else plan.of_stage(modules)
    cuts = {cut.module: SHARD_DIMENSION.get(cut.style) for cut in own.tensor_cuts}
    weights: dict[str, list[Weight]] = {}
    for parameter in own.parameters:
        module = parameter.name.rpartition(".")[0]
        weights.setdefault(_unit_of(module, own.shard_units), []).append(
            Weight(parameter.shape, cuts.get(module), module)
        )
    units = []
    for unit in own.shard_units:
        is_block = bool(unit.modules) and set(unit.modules) <= set(own.recompute_units)
        if held := weights.get(_key(unit)):
            units.append(Unit(tuple(held), unit.reshard, unit.weights_in_backward, is_block))
    blocks = [unit for unit in units if unit.is_block]
    return Stage(
        first=modules[0] == plan.stage_units[0],
        last=modules[-1] == plan.stage_units[-1],
        blocks=len(blocks),
        block=blocks[0] if blocks else Unit((), True, True, True),
        others=tuple(unit for unit in units if not unit.is_block),
    )


def _key(unit: ShardUnit) -> str:
    return ",".join(unit.modules)


def _unit_of(module: str, units: Sequence[ShardUnit]) -> str:
    """The unit of a module's parameters: the first one that names the module or a parent of it, else the root."""
    for unit in units:
        if any(module == name or module.startswith(f"{name}.") for name in unit.modules):
            return _key(unit)
    return ""
