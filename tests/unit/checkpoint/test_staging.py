"""Copies for saves in the background: equal values, memory that is reused, and blocks that waste little."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, strategies
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from quadriga.checkpoint.staging import ALIGNMENT, BLOCK_BYTES, Staging, pack


def llama3_8b(bytes_each: int) -> list[int]:
    """Bytes of the matrices and norms of Llama 3.1 8B."""
    block = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3 + [4096] * 2
    return [count * bytes_each for count in [128256 * 4096] * 2 + block * 32 + [4096]]


@pytest.mark.parametrize("ranks", [1, 3, 4, 64])
def test_the_blocks_of_8b_are_hardly_larger_than_its_state(ranks: int) -> None:
    sizes = [-(-size // ranks) for size in llama3_8b(4) * 3]  # weights and two moments in float32
    blocks, _ = pack(sizes)
    assert sum(blocks) <= 1.02 * sum(sizes)


@given(strategies.lists(strategies.integers(0, 3 * BLOCK_BYTES), max_size=60))
def test_tensors_lie_side_by_side_in_powers_of_two(sizes: list[int]) -> None:
    blocks, places = pack(sizes)
    assert all(block & (block - 1) == 0 for block in blocks)
    ends = [0] * len(blocks)
    for (block, start), size in sorted(zip(places, sizes, strict=True)):
        assert start % ALIGNMENT == 0
        assert size == 0 or (ends[block] <= start and start + size <= blocks[block])
        ends[block] = max(ends[block], start + size)


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "narrow": torch.randn(300, generator=generator).to(torch.bfloat16),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
    }


def test_copies_have_the_values_and_do_not_change_with_them() -> None:
    tensors = some_tensors(1)
    kept = {name: value.clone() for name, value in tensors.items()}
    copies = Staging(pinned=False).copy(tensors)
    for value in tensors.values():
        value.zero_()
    assert copies.keys() == kept.keys()
    for name, value in kept.items():
        assert copies[name].dtype == value.dtype
        assert torch.equal(copies[name], value)


def test_the_memory_is_reused_also_for_a_part_of_the_tensors() -> None:
    staging = Staging(pinned=False)
    first = {name: copy.data_ptr() for name, copy in staging.copy(some_tensors(1)).items()}
    assert {name: copy.data_ptr() for name, copy in staging.copy(some_tensors(2)).items()} == first
    part = staging.copy({"weight": torch.ones(7, 5)})
    assert part["weight"].data_ptr() == first["weight"]
    assert list(part) == ["weight"]


def test_another_shape_gets_memory_of_its_own() -> None:
    staging = Staging(pinned=False)
    staging.copy(some_tensors(1))
    wider = some_tensors(1) | {"weight": torch.ones(70, 50)}
    assert torch.equal(staging.copy(wider)["weight"], torch.ones(70, 50))


def test_a_copy_is_written_without_its_neighbours() -> None:
    copies = Staging(pinned=False).copy({"small": torch.ones(4), "large": torch.ones(1 << 16)})
    file = io.BytesIO()
    torch.save(copies["small"], file)
    assert len(file.getvalue()) < 4096


def test_the_copy_of_a_shard_on_gpus_stays_in_host_memory() -> None:
    """A DTensor of a mesh of GPUs; `DTensor.from_local` would copy the staged shard back to the GPU."""
    mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False, _rank=1)
    shard = torch.arange(12.0).view(3, 4)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(torch.Size((6, 4)), (4, 1), shard.dtype))
    copies = Staging(pinned=False).copy({"weight": DTensor(shard, spec, requires_grad=False)})
    copy = copies["weight"]
    assert isinstance(copy, DTensor)
    assert (copy.device_mesh, copy.placements, copy.shape, copy.stride()) == (mesh, (Shard(0),), (6, 4), (4, 1))
    local = copy.to_local()
    assert (local.device.type, local.data_ptr() == shard.data_ptr()) == ("cpu", False)
    assert torch.equal(local, shard)
