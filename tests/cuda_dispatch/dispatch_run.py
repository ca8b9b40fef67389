"""Rehearses one rank on the CUDA dispatch of torch, and records what it called.

Tensors hold nothing (`FakeTensorMode`), the process group sends nothing, and `driver.c` stands for the device. What
runs is real: torch's dispatch for CUDA, its choice of attention kernels, autograd with streams and events, and
`fully_shard`. No kernel runs, so this shows neither values nor times, nor what a compiler generates. CPU offload is out
of reach: its copies are between two devices, and fake tensors cannot be paged in.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from dispatch_rows import BASE, TOLERANCE, Row
from estimating import run_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.comm.call_recorder import CallRecorder, axis_by_ranks
from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.config import Run
from quadriga.parallel import attention_allgather, attention_ring
from quadriga.planning.communication import collective_calls
from quadriga.planning.memory import memory_of
from quadriga.planning.setup import Setup
from quadriga.rehearsal import rehearse
from quadriga.rehearsal.live_memory import LiveMemory
from quadriga.resilience.health import HealthMonitor
from quadriga.tensors import tensors_in, to_local
from quadriga.train.build import build_step_config
from quadriga.train.numerics import set_numerics
from quadriga.train.state import TrainState
from quadriga.train.step import StepConfig, train_step

DEVICE = torch.device("cuda", 0)
ATTENTION = re.compile(r"aten::_scaled_dot_product_(?:fused_)?(\w+?)_attention(?:_backward)?$")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Operations that wait for a value of the device: it decides a number or a shape on the host.
READS = re.compile(r"aten::(?:_local_scalar_dense|item|is_nonzero|equal|nonzero|masked_select|unique\w*|bincount)$")
# Operations of context parallelism. Autograd and fake tensors see none of the kernels within them.
WHOLE = (
    attention_allgather.chunk_attention,
    attention_allgather.chunk_attention_backward,
    attention_ring.ring_attention,
    attention_ring.ring_attention_backward,
)


class DispatchRecorder(TorchDispatchMode):
    """Counts operations by name. `host_reads`: the names of those that copy from the device, or read a value there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches first; its operations arrive here again, on plain tensors
        name = operation._schema.name
        self.operations[name] += 1
        given = [tensor.device.type for tensor in tensors_in((args, tuple((kwargs or {}).values())))]
        if READS.match(name) and "cuda" in given:
            self.host_reads[name] += 1
        result = operation(*args, **(kwargs or {}))
        on_host = any(tensor.device.type == "cpu" for tensor in tensors_in(result))
        if (on_host and "cuda" in given) or (name == "aten::copy_" and given[:2] == ["cpu", "cuda"]):
            self.host_reads[f"{name} to the CPU"] += 1
        return result

    @property
    def kernels(self) -> list[str]:
        """The attention kernels that were called, by their short names."""
        found = {match[1] for name in self.operations if (match := ATTENTION.match(name))}
        return sorted(found | ({"math"} if "aten::_softmax" in self.operations else set()))


@dataclass(frozen=True)
class Dispatched:
    """What one rank called in its first two steps; memory and collectives are those of the first.

    `memory` and `predicted_memory`: bytes of active memory at the peak, before the update. `calls` and
    `predicted_calls`: by kind, the number of calls and their bytes.
    """

    kernels: list[str]
    host_reads: dict[str, int]
    operations: int
    memory: int
    predicted_memory: float
    calls: dict[str, tuple[int, int]]
    predicted_calls: dict[str, tuple[float, float]]

    @property
    def memory_error(self) -> float:
        return self.predicted_memory / self.memory - 1

    @property
    def bytes_error(self) -> float:
        """The largest relative error of the bytes of a kind."""
        return self._largest_error(1)

    @property
    def calls_error(self) -> float:
        """The largest relative error of the number of calls of a kind."""
        return self._largest_error(0)

    def _largest_error(self, which: int) -> float:
        nothing = (0, 0)
        kinds = self.calls.keys() | self.predicted_calls.keys()
        pairs = [
            (self.calls.get(kind, nothing)[which], self.predicted_calls.get(kind, nothing)[which]) for kind in kinds
        ]
        errors = [predicted / sent - 1 if sent else float("inf") for sent, predicted in pairs if sent != predicted]
        return max(errors, key=abs, default=0.0)


def faults(row: Row, found: Dispatched) -> list[str]:
    """What is wrong about a row, as text."""
    wrong = []
    if len(found.kernels) != 1 or found.kernels[0] not in row.kernels:
        wrong.append(f"attention takes {found.kernels}, wanted is one of {row.kernels}")
    if found.host_reads:
        wrong.append(f"a step waits for values of the device: {found.host_reads}")
    for figure in ("memory", "bytes", "calls"):
        error, known = getattr(found, f"{figure}_error"), row.known.get(figure)
        if known is None and abs(error) > TOLERANCE:
            wrong.append(f"the estimate of {figure} is {error:+.1%} off")
        elif known is not None and abs(error) <= TOLERANCE:
            wrong.append(f"the known difference of {figure} is gone ({error:+.1%}); remove it from the row")
        elif known is not None and abs(error - known) > TOLERANCE:
            wrong.append(f"the known difference of {figure}, {known:+.1%}, is now {error:+.1%}")
    return wrong


def dispatched(row: Row) -> Dispatched:
    """Rehearse a row, in a process of its own (`in_a_process`): torch remembers the groups of earlier meshes."""
    run = run_of(*row.keys, ranks=row.ranks, base=BASE)
    set_numerics(run)
    dist.init_process_group("fake", rank=row.rank, world_size=row.ranks, store=FakeStore())
    mesh = build_mesh(run.spec.degrees, DEVICE.type)
    with mock.patch.object(rehearse, "HOST", DEVICE), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = rehearse.empty_state(run, mesh, mode)
        state.health = HealthMonitor(run.config.health, DEVICE)  # as in training: the device judges each step
        step_config = build_step_config(run, mesh, DEVICE, state.parts)
        with DispatchRecorder() as recorder, seen_within(recorder):
            with CallRecorder(axis_by_ranks(mesh)) as calls, LiveMemory() as live:
                memory = peak_of_step(state, step_config, mesh, live)
            train_step(state, step_config, mesh)  # another one, with the state of the optimizer
    counts, sizes = calls.counts(), calls.bytes()
    sent = {kind: (0, 0) for kind, _ in counts}
    for kind, axis in counts:
        sent[kind] = (sent[kind][0] + counts[kind, axis], sent[kind][1] + sizes[kind, axis])
    return Dispatched(
        kernels=recorder.kernels,
        host_reads=dict(recorder.host_reads),
        operations=recorder.operations.total(),
        memory=memory,
        predicted_memory=memory_of(Setup(run, DEVICE.type), pipeline_rank(run, row.rank)).peak.total,
        calls=sent,
        predicted_calls=predicted_calls(run, row.rank),
    )


def peak_of_step(state: TrainState, step_config: StepConfig, mesh: Mesh, live: LiveMemory) -> int:
    """Take the first step. Returns the peak bytes before the update, with parameters and the moments that it creates.

    The update does not count: on fake tensors its kernels allocate what the real ones do not.
    """
    live.track([parameter.detach() for parameter in state.parameters()])
    peaks: list[int] = []
    before_update = state.optimizer.register_step_pre_hook(lambda *_: peaks.append(live.peak))
    train_step(state, step_config, mesh)
    before_update.remove()
    states = [state.optimizer.state[parameter] for parameter in state.parameters()]
    moments = [to_local(each[name]) for each in states for name in ("exp_avg", "exp_avg_sq")]
    return peaks[0] + sum(moment.numel() * moment.itemsize for moment in moments)


def choice_of_torch(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> int:
    """The number of the kernel that torch's attention takes. It has `torch._fused_sdp_choice` for fake tensors too, but
    that one answers for their storage, which is on no device."""
    with DispatchRecorder() as asked:
        torch.ops.aten.scaled_dot_product_attention.default.decompose(q, k, v, *more, **options)
    (kernel,) = asked.kernels
    return int(BACKENDS[kernel].value)


@contextmanager
def seen_within(recorder: DispatchRecorder) -> Iterator[None]:
    """Within operations of `WHOLE`, what they do is recorded too. Their results are those of their fake kernels."""

    def with_inside(operation: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inside = DispatchRecorder()
            with inside:
                operation._init_fn(*args)
            recorder.operations += inside.operations
            recorder.host_reads += inside.host_reads
            return fake(*args)

        return run

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "_fused_sdp_choice", choice_of_torch))
        for operation in WHOLE:
            fake = with_inside(operation, operation._abstract_fn)
            patches.enter_context(mock.patch.object(operation, "_abstract_fn", fake))
        yield


def pipeline_rank(run: Run, rank: int) -> int:
    return rank // (run.spec.world_size // run.spec.degrees.pp)


def predicted_calls(run: Run, rank: int) -> dict[str, tuple[float, float]]:
    """By kind, the number of calls and their bytes."""
    found: dict[str, tuple[float, float]] = {}
    for call in collective_calls(Setup(run, DEVICE.type), pipeline_rank(run, rank)):
        count, size = found.get(call.kind, (0.0, 0.0))
        found[call.kind] = (count + call.calls, size + call.bytes)
    return found


def in_a_process(task: Callable[..., Any], *given: Any) -> Any:
    """`task(*given)` in a fork of this process, which has torch imported and no device. Raises RuntimeError with the
    traceback of an exception there."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, task, given))
    child.start()
    there.close()
    try:
        good, found = here.recv()
    except EOFError:
        good, found = False, "the process ended without a result"
    child.join()
    if not good:
        raise RuntimeError(found)
    return found


def _answer(pipe: Any, task: Callable[..., Any], given: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, task(*given)))
    except BaseException:  # noqa: BLE001 - it is raised again in the parent
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)


def figures(found: Dispatched) -> dict[str, Any]:
    """For a result file."""
    errors = {"memory_error": found.memory_error, "bytes_error": found.bytes_error, "calls_error": found.calls_error}
    return {**asdict(found), **errors}
