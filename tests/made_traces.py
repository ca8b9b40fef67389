"""Small traces as torch.profiler writes them on a GPU, event by event, for tests that know the right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOST, STREAM = 100, 7  # thread ids
BASE_NS = 1_700_000_000_000_000_000


class MadeTrace:
    """Times in microseconds of the trace. `shift`: added to all of them, and taken from the base: another clock."""

    def __init__(self, rank: int, world_size: int = 2, shift: float = 0.0, machine: str | None = "one") -> None:
        self.events: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {
            "schemaVersion": 1,
            "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world_size},
            "baseTimeNanoseconds": BASE_NS - round(shift * 1000),
        }
        if machine is not None:
            self.about["host_name"] = machine
        self._shift = shift

    def host(self, name: str, start: float, end: float, category: str = "cpu_op", **args: Any) -> None:
        self._add(name, category, start, end, HOST, args)

    def mark(self, name: str, start: float, end: float) -> None:
        self.host(name, start, end, "user_annotation")

    def launch(self, at: float, correlation: int) -> None:
        self._add("cudaLaunchKernel", "cuda_runtime", at, at + 1, HOST, {"correlation": correlation})

    def device(
        self, name: str, start: float, end: float, correlation: int, category: str = "kernel", **args: Any
    ) -> None:
        self._add(name, category, start, end, STREAM, {"correlation": correlation, **args})

    def write(self, path: Path, **layout: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**self.about, "traceEvents": self.events}, **layout))

    def _add(self, name: str, category: str, start: float, end: float, thread: int, args: dict[str, Any]) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread}
        self.events.append({**event, "ts": start + self._shift, "dur": end - start, "args": args})


def record(name: str, taken: int, given: int, dtype: str, group: str = "3", purpose: str = "mesh_dp_shard") -> Any:
    """What NCCL's process group leaves on record_param_comms."""
    return {
        "Collective name": name,
        "dtype": dtype,
        "In msg nelems": taken,
        "Out msg nelems": given,
        "Group size": 2,
        "Process Group Name": group,
        "Process Group Description": purpose,
        "Process Group Ranks": "[0, 1]",
    }


def two_steps(rank: int, kernels: dict[str, str], *, linked: bool = True, **about: Any) -> MadeTrace:
    """Two equal steps of 1,000 us: the figures are worked out in tests/unit/analysis/trace/test_trace_by_hand.py.

    `kernels`: names of the collectives' rows on the device; not `linked`: nothing tells who launched them.
    """
    trace = MadeTrace(rank, shift=5000.0 * rank, **about)
    late = 30 if rank == 1 else 0  # the second rank begins its all-gather later, and copies 10 us behind
    behind = 10 if rank == 1 else 0
    for number in range(2):
        t, c = 1000.0 * number, 10 * number
        trace.mark(f"ProfilerStep#{7 + number}", t, t + 1000)
        trace.mark("quadriga:data_wait", t, t + 100)
        trace.mark("FSDP::pre_forward (layers.0)", t + 100, t + 104)
        trace.host("aten::copy_", t + 104, t + 108)
        trace.launch(t + 105, c + 5)
        trace.device("Memcpy HtoD (Pinned -> Device)", t + 110, t + 160, c + 5, "gpu_memcpy")
        if linked:
            trace.host("c10d::_allgather_base_", t + 110, t + 140)
            trace.host(
                "record_param_comms", t + 112, t + 138, **record("_allgather_base", 500, 1000, "BFloat16"), Seq=number
            )
        trace.launch(t + 120, c + 1)
        trace.device(kernels["all_gather"], t + 200 + late, t + 300, c + 1)
        trace.host("aten::mm", t + 300, t + 320)
        trace.launch(t + 310, c + 2)
        trace.device("ampere_bf16_s16816gemm_bf16_128x128", t + 250, t + 450, c + 2)
        trace.mark("FSDP::post_forward (layers.0)", t + 490, t + 500)
        if linked:
            trace.host("c10d::_reduce_scatter_base_", t + 600, t + 640)
            trace.host("record_param_comms", t + 605, t + 635, **record("_reduce_scatter_base", 1000, 500, "Float"))
        trace.launch(t + 610, c + 3)
        copies = kernels["reduce_scatter"].startswith("Memcpy")
        category = "gpu_memcpy" if copies else "kernel"
        trace.device(kernels["reduce_scatter"], t + 650 + behind, t + 750 + behind, c + 3, category)
        trace.mark("Optimizer.step#AdamW.step", t + 770, t + 790)
        trace.host("aten::_fused_adamw_", t + 772, t + 788)
        trace.launch(t + 775, c + 4)
        trace.device("multi_tensor_apply_kernel<adam>", t + 800, t + 900, c + 4)
    return trace
