"""One rank of a fake process group, in a process of its own: real modules and meshes, tensors that hold nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from quadriga.comm.call_recorder import CallRecorder, axis_by_ranks
from quadriga.comm.mesh import build_mesh
from quadriga.config import Run
from quadriga.rehearsal.live_memory import LiveMemory
from quadriga.rehearsal.rehearse import HOST, empty_state
from quadriga.train.build import build_step_config
from quadriga.train.state import TrainState
from quadriga.train.step import train_step, with_last

T = TypeVar("T")


def on_fake_ranks(task: Callable[..., T], run: Run, *ranks: int) -> list[T]:
    """`task(run, rank)` as each of some ranks of the run, of which the others are not there.

    In processes of their own, since torch remembers the groups of earlier meshes by names that mean others later.
    """
    return [run_ranks(_as_rank, 1, task, run, rank, backend=None, timeout=200)[0] for rank in ranks]


def _as_rank(task: Callable[..., T], run: Run, rank: int) -> T:
    dist.init_process_group("fake", rank=rank, world_size=run.spec.world_size, store=FakeStore())
    try:
        return task(run, rank)
    finally:
        dist.destroy_process_group()


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rehearsed_state(run: Run) -> tuple[TrainState, Callable[[], None]]:
    """The state of this rank, and what takes a step with it."""
    mesh = build_mesh(run.spec.degrees, HOST.type)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode as nothing:
        state = empty_state(run, mesh, nothing)
        step_config = build_step_config(run, mesh, HOST, state.parts)

    def step() -> None:
        with mode:
            train_step(state, step_config, mesh)

    return state, step


def recorded_step(run: Run, rank: int) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """What one step sends: calls and bytes by kind and axis."""
    mesh = build_mesh(run.spec.degrees, HOST.type)
    with FakeTensorMode(allow_non_fake_inputs=True) as nothing:
        state = empty_state(run, mesh, nothing)
        step_config = build_step_config(run, mesh, HOST, state.parts)
        with CallRecorder(axis_by_ranks(mesh)) as recorder:
            train_step(state, step_config, mesh)
    return recorder.counts(), recorder.bytes()


def peak_of_passes(run: Run, rank: int) -> int:
    """The most bytes that are alive in the forward and backward passes of a step, beside parameters and moments."""
    mesh = build_mesh(run.spec.degrees, HOST.type)
    with FakeTensorMode(allow_non_fake_inputs=True) as nothing:
        state = empty_state(run, mesh, nothing)
        step_config = build_step_config(run, mesh, HOST, state.parts)
        with LiveMemory() as live:
            for parameter in state.parameters():
                live.track(parameter.detach())
            batch = state.loader.next()
            before = live.reset_peak()
            for micro_batch, last in with_last(batch.micro_batches(step_config.micro_batch_rows)):
                reduce = step_config.reduce_gradients == "every_micro_batch"
                step_config.forward_backward.train(micro_batch, reduce=reduce, last=last)
            return live.peak - before
