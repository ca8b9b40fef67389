"""Every layout starts from bit-equal weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from quadriga.config.model_spec import ModelSpec
from quadriga.models.plan import ParameterPlan
from quadriga.models.registry import build_model, parallel_plan
from quadriga.parallel.materialize import materialize

CPU = torch.device("cpu")
# 37, 9 and 6 rows do not divide by 4, nor 37 and 9 by 2; the 2 rows of keys leave two of 4 ranks with none.
UNEVEN = ModelSpec(name="llama3", flavor="odd", dim=6, n_layers=2, n_heads=3, n_kv_heads=1, ffn_dim=9, vocab_size=37)
EVEN = ModelSpec(
    name="llama3", flavor="even", dim=512, n_layers=1, n_heads=8, n_kv_heads=4, ffn_dim=768, vocab_size=1024
)


def _model(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return build_model(spec)


def _digests(model: nn.Module) -> dict[str, str]:
    """A hash of each whole parameter, put together from the ranks that hold it."""
    digests = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digests[name] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
    return digests


def _alone(spec: ModelSpec) -> dict[str, str]:
    model = _model(spec)
    materialize(model, parallel_plan(spec).parameters, 11, CPU)
    return _digests(model)


def _shard(model: nn.Module, spec: ModelSpec, mesh) -> None:
    for unit in parallel_plan(spec).shard_units:
        modules = [model.get_submodule(name) for name in unit.modules]
        fully_shard(modules if modules else model, mesh=mesh)


def sharded(spec: ModelSpec, shape: tuple[int, ...]) -> tuple[dict[str, str], int]:
    """FSDP over (shards,), HSDP over (copies, shards); also the elements that this rank holds."""
    model = _model(spec)
    _shard(model, spec, init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :]))
    materialize(model, parallel_plan(spec).parameters, 11, CPU)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    return _digests(model), held


def tensor_parallel_then_sharded(spec: ModelSpec) -> dict[str, str]:
    """Two-way tensor parallelism by rows and columns, two-way FSDP over it: `_StridedShard`, and columns of blocks."""
    model, mesh = _model(spec), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, parameter in list(model.named_parameters()):
        owner, leaf = name.rsplit(".", 1)
        module = model.get_submodule(owner)
        by_columns = owner.endswith(("wo", "w2"))
        placement = Replicate() if parameter.dim() == 1 else Shard(1 if by_columns else 0)
        setattr(module, leaf, nn.Parameter(distribute_tensor(parameter, mesh["tp"], [placement])))
    _shard(model, spec, mesh["dp"])
    assert any("_StridedShard" in str(parameter.placements) for parameter in model.parameters())
    materialize(model, parallel_plan(spec).parameters, 11, CPU)
    return _digests(model)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=["fsdp2", "fsdp4", "hsdp2x2"])
@pytest.mark.parametrize("spec", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_shards_put_together_are_the_weights_of_one_rank(spec: ModelSpec, shape: tuple[int, ...]) -> None:
    alone = _alone(spec)
    results = run_ranks(sharded, 2 if shape == (2,) else 4, spec, shape)
    assert all(digests == alone for digests, _ in results)
    if spec is EVEN:
        whole = sum(parameter.numel() for parameter in _model(spec).parameters())
        assert {held for _, held in results} == {whole // shape[-1]}


@pytest.mark.parametrize("spec", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_so_are_shards_under_tensor_parallelism(spec: ModelSpec) -> None:
    assert run_ranks(tensor_parallel_then_sharded, 4, spec) == [_alone(spec)] * 4


def one_matrix(shape: tuple[int, int]) -> list[str]:
    """A matrix of several blocks under placements that a model may use later; each must give the same whole."""
    results = []
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(0), Shard(0)]):
        mesh = init_device_mesh("cpu", (2, 2))
        model = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        model.weight = nn.Parameter(distribute_tensor(model.weight, mesh, placements))
        model.reset_buffers = lambda: None
        materialize(model, (ParameterPlan("weight", shape),), 5, CPU)
        results.append(_digests(model)["weight"])
    return results


def test_any_placement_gives_the_same_whole() -> None:
    shape = (1500, 701)
    alone = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    alone.reset_buffers = lambda: None
    materialize(alone, (ParameterPlan("weight", shape),), 5, CPU)
    expected = _digests(alone)["weight"]
    assert run_ranks(one_matrix, 4, shape) == [[expected] * 4] * 4
