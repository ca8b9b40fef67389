"""A rehearsal: builds the real model and runs one real step of one rank, on fake tensors and a fake process group
(`DRY_RUN=1 ... --rehearse`). It needs no GPU, no data and little memory, for a run of any size.

It shows that the configuration can be built and run, and what the step sends. It does not show that the values are
right, or how long anything takes on the real machine.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from quadriga.comm.backend import BACKENDS
from quadriga.comm.call_recorder import CallRecorder, axis_by_ranks
from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.config import JobConfig, Run, read
from quadriga.config.schema import Health as HealthSection
from quadriga.data.document_borders import document_tensors
from quadriga.data.loader import Batch, Loader
from quadriga.data.streams import Cursor
from quadriga.errors import EXIT_FAULT, EXIT_OK, UserError
from quadriga.models.plan import ParameterPlan
from quadriga.models.registry import catalogue
from quadriga.planning.communication import collective_calls
from quadriga.planning.memory import memory_of
from quadriga.planning.setup import Setup
from quadriga.rehearsal.live_memory import LiveMemory
from quadriga.resilience.health import HealthMonitor
from quadriga.tensors import to_local
from quadriga.train.build import build_parts, build_state, build_step_config
from quadriga.train.state import TrainState
from quadriga.train.step import StepConfig, train_step
from quadriga.units import format_bytes, format_count

HOST = torch.device("cpu")
ESTIMATE_TOLERANCE = 0.03  # largest relative error of the estimate of active memory


@dataclass(frozen=True)
class Rehearsal:
    """Results of the rehearsal of one rank.

    `n_parameters`: elements of its own shards. `peak`: peak bytes of active memory from the forward pass to the end of
    the backward pass. `calls`: (kind, axis, calls per step, bytes per step), most bytes first.
    """

    rank: int
    n_parameters: int
    peak: int
    build_seconds: float
    step_seconds: float
    calls: tuple[tuple[str, str, int, int], ...]


@dataclass
class EmptyLoader:
    """A loader whose batches consist of token 0, each row one document."""

    rows: int
    seq_len: int
    document_mask: bool = False
    waited: float = 0.0

    def snapshot(self) -> dict[int, Cursor]:
        """There is no position in the data."""
        return {}

    def next(self) -> Batch:
        tokens = torch.zeros(self.rows, self.seq_len, dtype=torch.int64)
        if not self.document_mask:
            return Batch(tokens, tokens)
        positions, borders = document_tensors([()] * self.rows, self.seq_len)
        return Batch(tokens, tokens, positions=positions, borders=borders, tokens_read=tokens.numel())


def empty_loader(run: Run) -> Loader:
    """A replacement for a loader if only `next` is called."""
    return cast(Loader, EmptyLoader(run.spec.rows_per_rank, run.spec.seq_len, run.config.training.document_mask))


def rehearse(run: Run, rank: int) -> Rehearsal:
    """Build the state of `rank` and run one step. Creates and destroys its own process group."""
    start = time.perf_counter()
    dist.init_process_group("fake", rank=rank, world_size=run.spec.world_size, store=FakeStore())
    try:
        mesh = build_mesh(run.spec.degrees, HOST.type)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
            state = empty_state(run, mesh, fake_mode)
            step_config = build_step_config(run, mesh, HOST, state.parts)
            built = time.perf_counter()
            with CallRecorder(axis_by_ranks(mesh)) as recorder, LiveMemory() as live:
                peak = _step(state, step_config, mesh, live)
        stepped = time.perf_counter()
        sizes = recorder.bytes()
        calls = [(kind, axis, count, sizes[kind, axis]) for (kind, axis), count in recorder.counts().items()]
        return Rehearsal(
            rank=rank,
            peak=peak,
            n_parameters=sum(to_local(parameter).numel() for parameter in state.parameters()),
            build_seconds=built - start,
            step_seconds=stepped - built,
            calls=tuple(sorted(calls, key=lambda call: -call[3])),
        )
    finally:
        dist.destroy_process_group()


def _step(state: TrainState, step_config: StepConfig, mesh: Mesh, live: LiveMemory) -> int:
    """Run one step. Returns the peak bytes before the update, including parameters and optimizer state.

    The update does not count: on fake tensors it allocates temporaries that a real update does not.
    """
    for parameter in state.parameters():
        live.track(parameter.detach())
    moments = 2 * sum(
        to_local(parameter).numel() * state_itemsize(state.optimizer, parameter) for parameter in state.parameters()
    )
    peaks: list[int] = []
    update = state.optimizer.register_step_pre_hook(lambda *_: peaks.append(live.peak))
    train_step(state, step_config, mesh)
    update.remove()
    return peaks[0] + moments


def state_itemsize(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Bytes per element of the optimizer's moments of a parameter."""
    state = optimizer.state.get(parameter, {})
    return next((value.itemsize for value in state.values() if value.dim() > 0), parameter.itemsize)


def empty_state(run: Run, mesh: Mesh, fake_mode: FakeTensorMode) -> TrainState:
    """The state of a run before its first step, with fake tensors."""

    def fill_nothing(part: nn.Module, parameters: tuple[ParameterPlan, ...], seed: int, device: torch.device) -> None:
        reset_buffers = part.reset_buffers
        assert callable(reset_buffers)
        with fake_mode:
            part.to_empty(device=device)
            reset_buffers()

    with torch.utils._python_dispatch._disable_current_modes():  # sharding reads meshes, which are real tensors
        parts = build_parts(run, mesh, HOST, fill=fill_nothing)
    state = build_state(run, parts, empty_loader(run), HOST)
    state.health = HealthMonitor(HealthSection(non_finite="ignore", spike="ignore"))  # fake losses have no value
    return state


def rehearsable(run: Run) -> tuple[Run, list[str]]:
    """The run without what a rehearsal cannot do, and the list of what was removed."""
    left_out, config = [], run.config
    if config.compile.enable:
        left_out.append("compile: the blocks are rehearsed uncompiled")
        config = _changed(config, "compile", enable=False)
    if config.model.converters:
        left_out.append("converters: linear layers are rehearsed in the dtype they are converted from")
        config = _changed(config, "model", converters=())
    if config.parallelism.enable_async_tensor_parallel:
        left_out.append("asynchronous tensor parallelism: the compiler does it")
        config = _changed(config, "parallelism", enable_async_tensor_parallel=False)
    spec = run.spec
    if spec.accumulation_steps > 1:
        left_out.append(f"accumulation: one of the {spec.accumulation_steps} passes of a step is rehearsed")
        rows = spec.global_batch_size // spec.accumulation_steps
        in_one_pass = spec.micro_batches // spec.accumulation_steps
        spec = replace(spec, global_batch_size=rows, accumulation_steps=1, micro_batches=in_one_pass)
    return replace(run, config=config, spec=spec), left_out


def _changed(config: JobConfig, table: str, **values: object) -> JobConfig:
    return config.model_copy(update={table: getattr(config, table).model_copy(update=values)})


def format_rehearsal(rehearsal: Rehearsal, run: Run) -> Iterator[str]:
    yield (
        f"  rank {rehearsal.rank} of {run.spec.world_size}: built in {rehearsal.build_seconds:.1f} s, one step in "
        f"{rehearsal.step_seconds:.1f} s; it holds {format_count(rehearsal.n_parameters)} parameters and sends per "
        "step:"
    )
    for kind, axis, count, size in rehearsal.calls:
        yield f"    {kind:<14} over {axis:<12} {count:>6} calls  {format_bytes(size):>12}"


def format_estimate_check(rehearsal: Rehearsal, run: Run) -> Iterator[str]:
    """Estimated and rehearsed figures side by side, for the kernels of this machine."""
    setup = Setup(run, HOST.type)
    rank = rehearsal.rank // (run.spec.world_size // run.spec.degrees.pp)
    predicted = memory_of(setup, rank)
    predicted_peak = predicted.peak.total
    error = predicted_peak / rehearsal.peak - 1
    beyond = (
        f"; more than {ESTIMATE_TOLERANCE:.0%} is a fault of the estimate" if abs(error) > ESTIMATE_TOLERANCE else ""
    )
    yield (
        f"    active memory  {format_bytes(rehearsal.peak)} at most; estimated {format_bytes(predicted_peak)} "
        f"({error:+.1%}{beyond})"
    )
    sent = Counter[str]()
    for kind, _, _, size in rehearsal.calls:
        sent[kind] += size
    predicted_bytes = Counter[str]()
    for call in collective_calls(setup, rank):
        predicted_bytes[call.kind] += round(call.bytes)
    wrong = [
        f"{kind} {format_bytes(predicted_bytes[kind])}"
        for kind in sent | predicted_bytes
        if sent[kind] != predicted_bytes[kind]
    ]
    yield (
        "    communication  as estimated"
        if not wrong
        else f"    communication  differs from the estimate: {', '.join(wrong)}"
    )


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Rehearse rank RANK of WORLD_SIZE for the run of `argv`, and print the results. Returns the exit code."""
    try:
        world_size = int(environ["WORLD_SIZE"])
        run = read(argv, environ, catalogue=catalogue(), backends=BACKENDS, world_size=world_size, training=False)
        run, left_out = rehearsable(run)
        print("".join(f"  without {what}\n" for what in left_out), end="")
        found = rehearse(run, int(environ["RANK"]))
        print("\n".join((*format_rehearsal(found, run), *format_estimate_check(found, run))), flush=True)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return error.exit_code
    except Exception:  # noqa: BLE001 - printed here once, with its traceback; the launcher returns the code
        print(f"the rehearsal failed:\n\n{traceback.format_exc()}", file=sys.stderr)
        return EXIT_FAULT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"  the rehearsal itself took {format_bytes(peak)} of memory")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
