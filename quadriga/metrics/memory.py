"""Measures the memory of a rank: of its CUDA device, or, on a CPU, of its process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from quadriga.units import GIB

PROCESS = Path("/proc/self/status")
Reading = dict[str, float]


def memory_reader(device: torch.device) -> Callable[[], Reading]:
    """A function that reads this rank's memory: in GiB, in percent of the total, and counts."""
    return (lambda: _cuda_memory(device)) if device.type == "cuda" else _process_memory


def _cuda_memory(device: torch.device) -> Reading:
    """Peaks of the allocator since the last call. Active: used by tensors; reserved: allocated from the device."""
    stats = torch.cuda.memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    active, reserved = stats.get("active_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory_active_gib": active / GIB,
        "memory_active_percent": 100 * active / total,
        "memory_reserved_gib": reserved / GIB,
        "memory_reserved_percent": 100 * reserved / total,
        "memory_alloc_retries": stats.get("num_alloc_retries", 0),
        "memory_ooms": stats.get("num_ooms", 0),
    }


def _process_memory() -> Reading:
    """The resident set of this process now, and its peak. Empty if the system does not report them."""
    if not PROCESS.exists():
        return {}
    lines = dict(line.split(":", 1) for line in PROCESS.read_text().splitlines() if line.startswith("Vm"))
    if "VmRSS" not in lines or "VmHWM" not in lines:
        return {}
    resident, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "memory_resident_gib": resident / GIB,
        "memory_peak_gib": peak / GIB,
        "memory_peak_percent": 100 * peak / total,
    }
