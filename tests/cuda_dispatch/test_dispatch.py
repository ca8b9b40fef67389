"""Each layout and mode on the CUDA dispatch of torch, without a GPU: `make test-cuda-dispatch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from dispatch_rows import ROWS, Row
from dispatch_run import DEVICE, Dispatched, DispatchRecorder, dispatched, faults, in_a_process
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_probe  # found by the line above

pytestmark = pytest.mark.cuda_dispatch


@pytest.mark.parametrize("name", ROWS)
def test_a_row(name: str) -> None:
    """All operations exist, the attention kernel is the wanted one, no step reads a value of the device on the host,
    and the estimate equals what was called and held."""
    found = in_a_process(dispatched, ROWS[name])
    assert faults(ROWS[name], found) == [], found


GOOD = Dispatched(["flash"], {}, 9, 1000, 1000.0, {"all_gather": (4, 100)}, {"all_gather": (4.0, 100.0)})
ROW = Row(1, (), ("flash",))
KNOWN = replace(ROW, known={"memory": 0.05})


@pytest.mark.parametrize(
    ("row", "found", "says"),
    [
        (ROW, replace(GOOD, kernels=["math"]), "attention takes ['math']"),
        (ROW, replace(GOOD, kernels=[]), "attention takes []"),
        (ROW, replace(GOOD, kernels=["flash", "math"]), "attention takes ['flash', 'math']"),
        (ROW, replace(GOOD, host_reads={"aten::item": 1}), "a step waits"),
        (ROW, replace(GOOD, predicted_memory=989.0), "the estimate of memory is -1.1% off"),
        (ROW, replace(GOOD, calls={"all_gather": (4, 98)}), "the estimate of bytes is +2.0% off"),
        (ROW, replace(GOOD, calls={"all_gather": (5, 100)}), "the estimate of calls is -20.0% off"),
        (ROW, replace(GOOD, calls={**GOOD.calls, "send": (1, 1)}), "the estimate of bytes is -100.0% off"),
        (ROW, replace(GOOD, calls={}), "the estimate of bytes is +inf% off"),
        (KNOWN, GOOD, "the known difference of memory is gone"),
        (KNOWN, replace(GOOD, predicted_memory=1070.0), "the known difference of memory, +5.0%, is now +7.0%"),
    ],
)
def test_what_is_wrong_is_found(row: Row, found: Dispatched, says: str) -> None:
    assert faults(ROW, GOOD) == []
    assert any(fault.startswith(says) for fault in faults(row, found))


def test_operations_of_asynchronous_tensor_parallelism_exist() -> None:
    """The compiler puts them into a graph, so no eager step calls them. Their shapes are those of TP over 2 ranks."""
    assert in_a_process(fused_shapes) == ([(2, 512, 256)], (2, 256, 1024))


def fused_shapes() -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The shapes of (sequence shards times columns), and of (columns times rows), scattered along the sequence."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    group = dist.distributed_c10d._get_default_group().group_name
    with FakeTensorMode():
        shard = torch.empty(2, 256, 1024, dtype=torch.bfloat16, device=DEVICE)
        columns = torch.empty(1024, 256, dtype=torch.bfloat16, device=DEVICE)
        _, products = torch.ops.symm_mem.fused_all_gather_matmul(shard, [columns], 1, group)
        rows = torch.empty(256, 1024, dtype=torch.bfloat16, device=DEVICE)
        scattered = torch.ops.symm_mem.fused_matmul_reduce_scatter(products[0], rows, "sum", 1, group)
    return [tuple(product.shape) for product in products], tuple(scattered.shape)


def test_a_value_that_is_read_on_the_host_is_found() -> None:
    assert in_a_process(reads_of, "copy") == {"aten::_to_copy to the CPU": 1}
    assert in_a_process(reads_of, "copy_") == {"aten::copy_ to the CPU": 1}
    assert in_a_process(reads_of, "item") == {"aten::_local_scalar_dense": 1}
    assert in_a_process(reads_of, "nonzero") == {"aten::nonzero": 1}
    assert in_a_process(reads_of, "nothing") == {}


def reads_of(what: str) -> dict[str, int]:
    with FakeTensorMode(), DispatchRecorder() as recorder:
        value = torch.ones((), device=DEVICE)
        try:
            if what == "copy":
                value.to("cpu")
            elif what == "copy_":
                torch.empty(()).copy_(value)
            elif what == "item":
                value.item()
            elif what == "nonzero":
                value.nonzero()
            else:
                value.to(DEVICE, torch.bfloat16).add(1)
        except (torch._subclasses.fake_tensor.DataDependentOutputException, RuntimeError):
            pass  # fake tensors have no value to read
    return dict(recorder.host_reads)


def test_questions_to_a_gpu_dispatch() -> None:
    """Those of benchmarks/gpu_probe.py that read no value: their calls are ones that this release of torch has."""
    found = in_a_process(probed)
    assert found["attention_time"]["default"] == "CUDNN_ATTENTION"
    assert found["versions"]["device"] == "NVIDIA H200"
    assert found.keys() == {question.__name__ for question in gpu_probe.QUESTIONS} - READING
    assert [answer for answer in found.values() if "failed" in answer] == []


READING = {"attention_of_parts", "race_of_found_inf"}  # these run on a CPU too, in tests/project/test_gpu_check.py


def once(run: Callable[[], object], times: int = 1) -> float:
    """Takes the place of the clock: there are no times here."""
    run()
    return 1.0


def probed() -> dict[str, Any]:
    with (
        FakeTensorMode(),
        mock.patch.object(gpu_probe, "milliseconds", once),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "_sleep"),
    ):
        asked = [question for question in gpu_probe.QUESTIONS if question.__name__ not in READING]
        return {question.__name__: gpu_probe.ask(question, DEVICE) for question in asked}


def test_work_that_reaches_the_device_is_an_error() -> None:
    """`driver.c` has no kernels, copies and waits."""
    with pytest.raises(RuntimeError, match="CUDA"):
        in_a_process(_allocate)


def _allocate() -> float:
    return float(torch.zeros(2, device=DEVICE).sum())
