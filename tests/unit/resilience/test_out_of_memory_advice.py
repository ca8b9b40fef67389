"""What counts as a lack of memory, and which changes are advised for which configuration."""

from __future__ import annotations

import pytest
import torch

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.models.registry import catalogue
from quadriga.resilience.out_of_memory import is_out_of_memory, memory_saving_changes


def run_of(*arguments: str, ranks: int = 4) -> Run:
    known = {"catalogue": catalogue(), "backends": BACKENDS, "world_size": ranks, "training": False}
    return read(["--model.hf_assets_path=builtin:bytes", *arguments], {}, **known)  # type: ignore[arg-type]


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("a stage of the pipeline failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        OSError(12, "Cannot allocate memory"),
        wrapped(MemoryError()),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: CUDA_ERROR_OUT_OF_MEMORY"),
    ],
    ids=["python", "device", "host", "system", "wrapped", "cuBLAS", "cuDNN", "attention of cuDNN"],
)
def test_a_lack_of_memory_is_known_in_all_its_forms(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), OSError(28, "No space")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_activations_come_first_in_the_forward_pass_and_state_in_the_optimizer() -> None:
    run = run_of()
    forward = memory_saving_changes(run, "forward and backward", on_device=True)
    assert "activation_checkpoint.mode=full" in forward[0]
    assert "training.loss_chunks=8" in forward[1]
    assert "training.local_batch_size=4 --training.global_batch_size=32" in forward[2]
    in_optimizer = memory_saving_changes(run, "optimizer", on_device=True)
    assert "more ranks" in in_optimizer[0]
    assert "enable_cpu_offload" in in_optimizer[1]
    assert sorted(forward) == sorted(in_optimizer)


@pytest.mark.parametrize(("rows", "micro_batch", "fewer"), [(8, 1, 4), (12, 3, 6), (2, 1, None), (4, 2, None)])
def test_a_pipeline_gets_a_smaller_batch_of_whole_micro_batches(rows: int, micro_batch: int, fewer: int | None) -> None:
    sizes = (f"--training.local_batch_size={rows}", f"--parallelism.pipeline_parallel_microbatch_size={micro_batch}")
    changes = memory_saving_changes(
        run_of(*sizes, "--parallelism.pipeline_parallel_degree=2"), "forward and backward", on_device=True
    )
    proposed = [change for change in changes if "local_batch_size" in change]
    assert len(proposed) == (fewer is not None)
    assert all(f"training.local_batch_size={fewer} " in change for change in proposed)


def test_replicas_are_cut_before_ranks_are_added() -> None:
    run = run_of("--parallelism.data_parallel_replicate_degree=4", "--parallelism.data_parallel_shard_degree=1")
    first = memory_saving_changes(run, "optimizer", on_device=True)[0]
    assert "data_parallel_replicate_degree=1" in first
    assert "4 times as many ranks" in first


def test_what_is_done_already_is_not_advised() -> None:
    spent = ("--activation_checkpoint.mode=full", "--training.local_batch_size=1", "--training.enable_cpu_offload")
    run = run_of(*spent, "--parallelism.fsdp_reshard_after_forward=always", "--training.loss_chunks=4", ranks=1)
    advised = memory_saving_changes(run, "forward and backward", on_device=True)
    assert len(advised) == 2
    assert "more ranks" in advised[0]
    assert "a machine with more memory" in advised[1]


def test_offload_is_no_help_on_the_host() -> None:
    assert not [
        change for change in memory_saving_changes(run_of(), "optimizer", on_device=False) if "offload" in change
    ]


def test_every_advised_key_can_be_given() -> None:
    """Each change that names keys is accepted by the configuration that it is advised for."""
    run = run_of("--training.mixed_precision_param=float32", "--activation_checkpoint.mode=none")
    given = ("--training.mixed_precision_param=float32", "--activation_checkpoint.mode=none")
    for change in memory_saving_changes(run, "forward and backward", on_device=True):
        keys = [part.rstrip(":") for part in change.split() if part.startswith("--")]
        run_of(*given, *keys)
