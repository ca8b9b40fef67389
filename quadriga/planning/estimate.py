"""The estimate of a run: memory, communication and step time of its ranks, and whether it fits. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import Heap
from quadriga.config import Run
from quadriga.hardware import Device
from quadriga.models.registry import flops_per_token
from quadriga.planning.communication import CollectiveCalls, collective_calls, heap_of
from quadriga.planning.memory import REST_FACTOR, STATE_FACTOR, Memory, memories_of
from quadriga.planning.rates import HOST_MEMORY, Rates
from quadriga.planning.setup import Setup
from quadriga.planning.step_time import StepTime, step_time, strides
from quadriga.units import GIB

FORMAT = "quadriga-estimate-1"
# Bytes of the CUDA context and of each communicator, outside of torch's allocator. Guesses, not measured.
CUDA_CONTEXT_BYTES, BYTES_PER_GROUP = 0.6 * GIB, 0.25 * GIB
OFFLOAD_RATES = f"CPU offload: the memory of a machine moves {HOST_MEMORY / 1e9:.0f} GB/s"
COMFORTABLE_SHARE = 0.9  # of the memory of a device; with more, a run fits barely
TIMES = ("products", "attention", "memory_bound", "optimizer", "communication", "hidden", "bubble", "host")
JSON_TIMES = {"communication": "exposed_communication", "hidden": "hidden_communication"}
COMMON_DEVICES = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb")  # shown if no device is named


@dataclass(frozen=True)
class MemoryFit:
    """Whether `needed` bytes fit into `capacity` bytes: `label` is `fits`, `fits barely` or `does not fit`."""

    needed: float
    capacity: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def label(self) -> str:
        if not self.fits:
            return "does not fit"
        return "fits" if self.needed <= COMFORTABLE_SHARE * self.capacity else "fits barely"


@dataclass(frozen=True)
class Estimate:
    """The predictions for a run. `device` None: no device was named. `rates` None: no step time is predicted."""

    run: Run
    device: Device | None
    rates: Rates | None
    gpus_per_node: int = 8

    @cached_property
    def setup(self) -> Setup:
        backend = BACKENDS.get(self.run.spec.backend or "")
        on_cpu = self.device.name == "CPU" if self.device else backend is not None and backend.device_type == "cpu"
        device_type = "cpu" if on_cpu else "cuda"
        return Setup(self.run.on_device(device_type), device_type)

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """By pipeline rank."""
        return memories_of(self.setup)

    @cached_property
    def worst(self) -> Memory:
        return max(self.memories, key=lambda memory: memory.reserved)

    @cached_property
    def heap(self) -> Heap | None:
        """The symmetric heap that peers write into, if the backend needs one."""
        return heap_of(self.run)

    @property
    def outside_allocator(self) -> float:
        """Bytes on the device outside of torch's allocator: CUDA context, buffers of communicators, symmetric heap."""
        degrees = self.setup.degrees
        sizes = (degrees.pp, degrees.dp_replicate, self.setup.shards, degrees.cp, degrees.tp)
        groups = sum(size > 1 for size in sizes) + (degrees.world_size > 1)
        heap = self.heap.nvshmem_bytes if self.heap else 0
        return 0.0 if self.setup.device_type == "cpu" else CUDA_CONTEXT_BYTES + groups * BYTES_PER_GROUP + heap

    @property
    def host_per_machine(self) -> float:
        """Bytes of host memory that the state of all ranks of a machine takes."""
        return self.worst.host * min(self.gpus_per_node, self.setup.degrees.world_size)

    @property
    def needed(self) -> float:
        """Bytes of the device that the run takes."""
        return self.worst.reserved + self.outside_allocator

    def memory_fit(self, device: Device | None = None) -> MemoryFit | None:
        """None if no device is named, or its memory is not known."""
        chosen = device or self.device
        return MemoryFit(self.needed, chosen.capacity) if chosen and chosen.capacity is not None else None

    @cached_property
    def calls(self) -> tuple[CollectiveCalls, ...]:
        """Of the pipeline rank that sends most."""
        by_rank = (collective_calls(self.setup, rank) for rank in range(self.setup.degrees.pp))
        return max(by_rank, key=lambda calls: sum(call.wire_bytes for call in calls))

    @cached_property
    def time(self) -> StepTime | None:
        """None without rates."""
        return step_time(self.setup, self.rates, self.gpus_per_node) if self.rates else None

    @property
    def tokens_per_second_per_device(self) -> float | None:
        spec = self.run.spec
        return spec.tokens_per_step / self.time.total / spec.world_size if self.time else None

    @property
    def flops_per_step(self) -> float:
        """FLOP of the model on all ranks, without recompute, as MFU counts them."""
        spec = self.run.spec
        return flops_per_token(spec.model, spec.seq_len) * spec.tokens_per_step

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s as a share of the device's dense peak; None if time or peak are unknown, and in float8."""
        training = self.run.config.training
        if self.time is None or self.device is None or self.run.config.model.converters:
            return None
        peak = self.device.peak_flops(training.mixed_precision_param, training.float32_matmul_precision)
        return self.flops_per_step / self.run.spec.world_size / self.time.total / peak if peak else None

    @property
    def assumptions(self) -> tuple[str, ...]:
        kernels = "of a CPU" if self.setup.device_type == "cpu" else "of CUDA, with flash or memory-efficient attention"
        known = [
            f"kernels {kernels}",
            f"reserved = {STATE_FACTOR:g} x state + {REST_FACTOR:g} x the rest at its peak (fitted to published runs)",
            "all ranks of a group have the same speed",
        ]
        if self.setup.compiled:
            known.append("what the compiler saves is assumed; compiled blocks are not measured on a GPU yet")
        if self.setup.offload:
            known.append(f"{OFFLOAD_RATES}; its copies and the update on the host overlap with nothing")
        return (*known, *(self.rates.descriptions if self.rates else ()))

    def to_dict(self, advice: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The JSON that docs/estimates.md describes."""
        worst, fit, spec, time = self.worst, self.memory_fit(), self.run.spec, self.time
        return {
            "format": FORMAT,
            "device": self.device.slug if self.device else None,
            "world_size": spec.world_size,
            "degrees": asdict(spec.degrees),
            "fits": fit.fits if fit else None,
            "verdict": fit.label if fit else None,
            "memory": {
                "peak_active_gib": worst.peak.total / GIB,
                "peak_reserved_gib": worst.reserved / GIB,
                "outside_gib": self.outside_allocator / GIB,
                "symmetric_heap_gib": self.heap.nvshmem_bytes / GIB if self.heap else None,
                "capacity_gib": fit.capacity / GIB if fit else None,
                "host_gib": worst.host / GIB,
                "host_per_machine_gib": self.host_per_machine / GIB,
                "moment": worst.peak.name,
                "by_kind": {kind: size / GIB for kind, size in worst.peak.by_kind.items()},
                "binding": list(worst.binding),
                "stages": [_of_rank(memory) for memory in self.memories],
            },
            "communication": [self._call(call) for call in self.calls],
            "flops_per_step": self.flops_per_step,
            "step_time_s": time.total if time else None,
            "time": {f"{JSON_TIMES.get(kind, kind)}_s": getattr(time, kind) for kind in TIMES} if time else None,
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "mfu": self.mfu,
            "gpu_hours": time.total * spec.steps * spec.world_size / 3600 if time else None,
            "calibrated": bool(self.rates and self.rates.measured),
            "advice": list(advice),
            "assumptions": list(self.assumptions),
        }

    def _call(self, call: CollectiveCalls) -> dict[str, Any]:
        inside = call.ranks * strides(self.setup)[call.axis] <= self.gpus_per_node
        seconds = next((taken for other, taken in self.time.by_call if other == call), None) if self.time else None
        return {
            "axis": call.axis,
            "collective": call.kind,
            "what": call.what,
            "when": call.when,
            "calls": call.calls,
            "bytes": call.size,
            "bytes_on_the_wire": call.wire_bytes,
            "ranks": call.ranks,
            "across_machines": not inside,
            "seconds": seconds,
        }

    def bytes_by_axis(self) -> dict[tuple[str, str], tuple[float, float, float]]:
        """Calls, bytes and bytes sent per step, by (axis, kind); the most bytes sent first."""
        found: dict[tuple[str, str], tuple[float, float, float]] = defaultdict(lambda: (0.0, 0.0, 0.0))
        for call in self.calls:
            calls, size, wire = found[call.axis, call.kind]
            found[call.axis, call.kind] = (calls + call.calls, size + call.bytes, wire + call.wire_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))


def _of_rank(memory: Memory) -> dict[str, Any]:
    return {
        "pipeline_rank": memory.rank,
        "parameters_gib": memory.parameters / GIB,
        "gradients_gib": memory.gradients / GIB,
        "optimizer_gib": memory.moments / GIB,
        "activations_gib": memory.activations / GIB,
        "activations_a_block_gib": memory.activations_per_block / GIB,
        "micro_batches_at_once": memory.in_flight,
        "peak_active_gib": memory.peak.total / GIB,
        "peak_reserved_gib": memory.reserved / GIB,
        "moment": memory.peak.name,
        "timeline": [{"moment": each.name, "active_gib": each.total / GIB} for each in memory.timeline],
    }


def estimate(run: Run, device: Device | None, rates: Rates | None = None, gpus_per_node: int = 8) -> Estimate:
    """The estimate of `run` on `device`. `rates`: measured ones; None: assumed from the device's data sheet.

    `gpus_per_node`: devices that share the fast link.
    """
    if rates is None and device is not None:
        training = run.config.training
        rates = Rates.assumed(device, training.mixed_precision_param, training.float32_matmul_precision)
    return Estimate(run, device, rates, gpus_per_node)
