"""The out-of-memory report: where it happened, the memory in use, and the two configuration changes that help most."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from quadriga.config import Run
from quadriga.errors import EXIT_OUT_OF_MEMORY, Fault, causes
from quadriga.resilience.progress import Progress
from quadriga.units import format_bytes

ESTIMATE_NAME = "estimate.json"  # in the run folder, written by this launch
SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
STATE_PHASES = {"weights", "optimizer", "save"}  # in which the weights and the optimizer's state weigh most


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of the host or the device."""
    return any(_is_memory_error(each) for each in causes(error))


def _is_memory_error(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in SIGNS)


def out_of_memory_fault(error: BaseException, run: Run, progress: Progress, rank: int) -> Fault:
    """The report on an error for which `is_out_of_memory` holds."""
    on_device = isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower()
    where = f"step {progress.step}, phase {progress.phase!r}" if progress.step else f"phase {progress.phase!r}"
    advice = _advice_of_estimate(Path(run.spec.folders.dump, ESTIMATE_NAME)) or list(
        memory_saving_changes(run, progress.phase, on_device)
    )
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


def memory_saving_changes(run: Run, phase: str, on_device: bool) -> Iterator[str]:
    """All configuration changes that would save memory, best first.

    In the phases `STATE_PHASES` those come first that shard parameters and optimizer state; elsewhere activations do.
    """
    of_state, of_activations = list(_for_state(run, on_device)), list(_for_activations(run))
    yield from (*of_state, *of_activations) if phase in STATE_PHASES else (*of_activations, *of_state)
    yield "a machine with more memory, or fewer other processes on this one"


def _for_activations(run: Run) -> Iterator[str]:
    config, rows, batch = run.config, run.config.training.local_batch_size, run.spec.global_batch_size
    if config.activation_checkpoint.mode != "full":
        yield "--activation_checkpoint.mode=full: keeps one activation per block, for about a third more computation"
    if rows > config.parallelism.pipeline_parallel_microbatch_size:
        fewer = next(count for count in range(rows // 2, 0, -1) if rows % count == 0)
        batches = f"--training.local_batch_size={fewer} --training.global_batch_size={batch}"
        yield f"{batches}: the same batch in {rows // fewer} times as many passes"
    if config.training.loss_chunks == 1:
        yield "--training.loss_chunks=8: holds the logits of an eighth of the tokens at a time, at no extra computation"
    if config.training.mixed_precision_param == "float32":
        yield "--training.mixed_precision_param=bfloat16: halves activations"
    if run.spec.degrees.dp_shard % 2 == 0 and batch % max(run.spec.degrees.batch // 2, 1) == 0:
        context = 2 * run.spec.degrees.cp
        yield f"--parallelism.context_parallel_degree={context}: each rank holds half as much of a sequence"


def _for_state(run: Run, on_device: bool) -> Iterator[str]:
    degrees, config = run.spec.degrees, run.config
    if degrees.dp_replicate > 1:
        yield (
            "--parallelism.data_parallel_replicate_degree=1 --parallelism.data_parallel_shard_degree=-1: "
            f"shards parameters and optimizer state over {degrees.dp_replicate} times as many ranks"
        )
    elif degrees.world_size == 1 or degrees.dp_shard > 1:
        yield "more ranks (NGPU, NNODES): parameters and optimizer state are sharded over all of them"
    if run.spec.reduce_gradients == "once" and run.spec.accumulation_steps > 1:
        yield "--parallelism.reduce_gradients=every_micro_batch: holds no whole-model gradients between micro-batches"
    if not run.spec.reshard_after_forward and degrees.dp_shard > 1:
        yield "--parallelism.fsdp_reshard_after_forward=always: holds the gathered parameters of one block at a time"
    if on_device and not config.training.enable_cpu_offload:
        yield "--training.enable_cpu_offload: keeps parameters and optimizer state in host memory, but is slower"
    if config.checkpoint.enable and config.checkpoint.async_mode != "disabled":
        yield "--checkpoint.async_mode=disabled: makes no copy of the state in host memory to save it"
