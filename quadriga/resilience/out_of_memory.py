"""The out-of-memory report: where it happened, the memory in use, and the two configuration changes that help most."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from quadriga.config import Run
from quadriga.errors import EXIT_OUT_OF_MEMORY, Fault, causes
from quadriga.planning.advice import remedies
from quadriga.resilience.progress import Progress
from quadriga.units import format_bytes

ESTIMATE_NAME = "estimate.json"  # in the run folder, written by this launch
HOST_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
SIGNS = (*HOST_SIGNS, "cuda_error_out_of_memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
DEVICE_SIGNS = ("cuda", "cublas", "cudnn")
STATE_PHASES = {"weights", "optimizer", "save"}  # in which the weights and the optimizer's state weigh most
OFFLOAD = "training__enable_cpu_offload"  # no help if the memory of the host has run out


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of the host or the device."""
    return any(_is_memory_error(each) for each in causes(error))


def _is_memory_error(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in SIGNS)


def out_of_memory_fault(error: BaseException, run: Run, progress: Progress, rank: int) -> Fault:
    """The report on an error for which `is_out_of_memory` holds."""
    on_device = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in DEVICE_SIGNS)
    where = f"step {progress.step}, phase {progress.phase!r}" if progress.step else f"phase {progress.phase!r}"
    advice = _advice_of_estimate(Path(run.spec.folders.dump, ESTIMATE_NAME))
    advice = advice or memory_saving_changes(run, progress.phase, on_device)
    lines = [
        f"rank {rank} ran out of {'device' if on_device else 'host'} memory in {where}",
        "",
        *(f"    {text}" for text in (_device_memory() if on_device else _host_memory())),
        f"    asked for  {_first_line(error)}",
        "",
        "What would help most:",
        *(f"    {change}" for change in advice[:2]),
        "",
        "Checkpoints that were finished before are complete: the same command resumes from the newest one.",
    ]
    return Fault("\n".join(lines), EXIT_OUT_OF_MEMORY)


def _device_memory() -> Iterator[str]:
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    most = format_bytes(torch.cuda.max_memory_allocated())
    yield f"allocated  {format_bytes(torch.cuda.memory_allocated())}, at most {most} so far"
    yield f"reserved   {format_bytes(torch.cuda.memory_reserved())} of {format_bytes(total)} on the device"


def _host_memory() -> Iterator[str]:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield f"held       {format_bytes(most)} by this process at its peak"


def _first_line(error: BaseException) -> str:
    error = next((each for each in causes(error) if _is_memory_error(each)), error)
    line = next((each for each in str(error).splitlines() if any(sign in each.lower() for sign in SIGNS)), str(error))
    return line.splitlines()[0].strip() if line else type(error).__name__


def _advice_of_estimate(path: Path) -> list[str]:
    """The changes that the run's estimate lists: strings, best first. [] if there is no readable estimate."""
    try:
        advice = json.loads(path.read_text())["if_memory_runs_out"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [line for line in advice if isinstance(line, str)] if isinstance(advice, list) else []


def memory_saving_changes(run: Run, phase: str, on_device: bool) -> list[str]:
    """All remedies as text, the best first.

    In the phases `STATE_PHASES` those come first that shard parameters and optimizer state; elsewhere activations do.
    """
    found = [each for each in remedies(run) if each.effect and (on_device or OFFLOAD not in each.changes)]
    first = "state" if phase in STATE_PHASES else "activations"
    return [str(each) for each in sorted(found[:-1], key=lambda each: each.kind != first)] + [str(found[-1])]
