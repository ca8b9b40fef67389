"""The symmetric heap in the estimate: its size by hand, its place in the memory of a device."""

from __future__ import annotations

import pytest
from estimating import run_of

from quadriga.comm.heap import RESERVE, Heap
from quadriga.config import Run
from quadriga.hardware import device_named
from quadriga.planning.communication import byte_share_by_backend, heap_of
from quadriga.planning.estimate import estimate
from quadriga.planning.report import estimate_rows
from quadriga.units import GIB, MIB

LLAMA_8B = ("--model.name=llama3", "--model.flavor=8B", "--training.dataset=builtin")
FORMATS = ("--training.mixed_precision_param=bfloat16", "--training.mixed_precision_reduce=float32")
EMBEDDING = 128256 * 4096  # the largest unit: the embedding, and the output layer with the last norm
OUTPUT = EMBEDDING + 4096


def run(backend: str, *arguments: str, ranks: int = 4) -> Run:
    return run_of(*LLAMA_8B, *FORMATS, f"--comm.backend={backend}", *arguments, ranks=ranks, base=())


def test_the_largest_unit_of_8b_by_hand() -> None:
    heap = heap_of(run("nvshmem"))
    assert heap == Heap(gather=2 * OUTPUT, scatter=4 * OUTPUT)
    assert heap.nvshmem_bytes == pytest.approx(2 * 2 * OUTPUT + 4 * OUTPUT + RESERVE, abs=MIB)


@pytest.mark.parametrize("backend", ["nccl", "nccl-symm", "gloo"])
def test_others_need_none(backend: str) -> None:
    assert heap_of(run(backend)) is None


def test_tensor_parallelism_cuts_it_and_a_pipeline_does_not() -> None:
    cut = heap_of(run("nvshmem", "--parallelism.tensor_parallel_degree=2"))
    assert cut == Heap(gather=EMBEDDING + 2 * 4096, scatter=2 * EMBEDDING + 4 * 4096)
    staged = heap_of(run("nvshmem", "--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"))
    assert staged == heap_of(run("nvshmem"))


def test_a_unit_that_does_not_divide_is_counted_with_its_padding() -> None:
    heap = heap_of(run("nvshmem", ranks=5))
    assert heap is not None
    assert heap.gather == 2 * (5 * -(-128256 // 5) * 4096 + 5 * -(-4096 // 5))


def test_it_counts_on_the_device() -> None:
    device = device_named("h100-80gb", "test")
    with_heap, without = estimate(run("nvshmem"), device), estimate(run("nccl"), device)
    assert with_heap.heap is not None
    assert with_heap.outside_allocator - without.outside_allocator == pytest.approx(with_heap.heap.nvshmem_bytes)
    assert with_heap.worst.reserved == without.worst.reserved
    content = with_heap.to_dict()["memory"]
    assert content["symmetric_heap_gib"] == with_heap.heap.nvshmem_bytes / GIB
    assert without.to_dict()["memory"]["symmetric_heap_gib"] is None


def test_it_is_reported() -> None:
    table = dict(estimate_rows(estimate(run("nvshmem"), None)))
    assert table["heap needed"].startswith("3.98 GiB per rank (2 x 1002.01 MiB for all-gathers, 1.96 GiB for sums")


def test_the_share_of_each_backend_by_hand() -> None:
    """FSDP over 4 ranks: each parameter is gathered (the blocks' twice) in bfloat16 and scattered in float32; what is
    left are the sums of 8 bytes of the norm, and of a table of 4 x 16 bytes."""
    block = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    gathered = 2 * (2 * 32 * block + EMBEDDING + OUTPUT)
    scattered = 4 * (32 * block + EMBEDDING + OUTPUT)
    sharded, others = 3 / 4 * (gathered + scattered), 2 * 3 / 4 * (8 + 4 * 16)
    always = "--parallelism.fsdp_reshard_after_forward=default"
    shares = byte_share_by_backend(run("nvshmem", always), "nvshmem")
    assert shares == pytest.approx({"nvshmem": sharded / (sharded + others), "nccl": others / (sharded + others)})
    assert sum(shares.values()) == pytest.approx(1)


def test_tensor_parallelism_goes_over_the_fallback_backend() -> None:
    shares = byte_share_by_backend(run("nvshmem", "--parallelism.tensor_parallel_degree=2"), "nvshmem")
    assert 0.1 < shares["nccl"] < 0.9
    assert byte_share_by_backend(run("nccl", "--parallelism.tensor_parallel_degree=2"), "nccl") == {"nccl": 1.0}
