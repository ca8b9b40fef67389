"""A few steps of the real trainer's parts on fixed batches, several configurations on the same ranks. For tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from tiny import to_full_tensor, without_next_document
from torch.distributed.fsdp import FSDPModule
from training import DEBUG_FILE, TINY

from quadriga.comm.backend import BACKENDS
from quadriga.comm.mesh import build_mesh
from quadriga.config import Run, read
from quadriga.data.document_borders import document_tensors
from quadriga.data.loader import Batch, Loader
from quadriga.models.registry import catalogue
from quadriga.optim.optimizer import build_optimizer
from quadriga.optim.schedule import build_schedule
from quadriga.train.build import build_forward_backward, build_parts, build_step_config
from quadriga.train.feed import Feed
from quadriga.train.loss import Divisor
from quadriga.train.state import TrainState
from quadriga.train.step import train_step

CPU = torch.device("cpu")
Arguments = tuple[str, ...]
SMALL: Arguments = (
    *TINY,
    *("--model.n_layers=4", "--training.seq_len=16", "--training.local_batch_size=4", "--training.steps=3"),
    *("--activation_checkpoint.mode=none", "--lr_scheduler.warmup_steps=0", "--optimizer.lr=1e-2"),
)


def pipeline(ranks: int, schedule: str = "1F1B") -> Arguments:
    key = "--parallelism.pipeline_parallel_"
    return (f"{key}degree={ranks}", f"{key}schedule={schedule}")


@dataclass
class PipelineTrace:
    """Per step the loss and the norm; the loss of a validation batch; then the weights that this rank holds, whole."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: float = 0.0
    initial_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    left_unsharded: list[str] = field(default_factory=list)  # modules whose gathered parameters outlived a step


@dataclass
class FixedBatches:
    """The rows of this rank, of batches that depend on the step alone."""

    run: Run
    rank: int
    step: int = 0
    waited: float = 0.0

    def snapshot(self) -> dict[int, Any]:
        return {}

    def next(self) -> Batch:
        self.step += 1
        spec = self.run.spec
        generator = torch.Generator().manual_seed(self.step)
        shape = (spec.global_batch_size, spec.seq_len + 1)
        rows = torch.randint(0, spec.model.vocab_size, shape, generator=generator)
        own = slice(self.rank * spec.rows_per_rank, (self.rank + 1) * spec.rows_per_rank)
        tokens, labels = rows[own, :-1].contiguous(), rows[own, 1:].contiguous()
        if not self.run.config.training.document_mask:
            return Batch(tokens, labels)
        starts = document_starts(self.step, spec.global_batch_size, spec.seq_len)[own]
        positions, borders = document_tensors(starts, spec.seq_len)
        masked = without_next_document(labels, starts)
        return Batch(tokens, masked, positions=positions, borders=borders, tokens_read=tokens.numel())


def document_starts(step: int, rows: int, seq_len: int) -> tuple[tuple[int, ...], ...]:
    """Where documents begin in the rows of a step, after 0. The rows take turns in these kinds, other ones each step:
    one document; a border on each eighth, so on each cut; documents of one token at both ends of a row; a document over
    almost all of the row; documents of one token only."""
    eighth = seq_len // 8
    kinds = [
        (),
        tuple(range(eighth, seq_len, eighth)),
        (1, 2, 3, seq_len - 1),
        (1, seq_len - 2),
        tuple(range(1, seq_len)),
    ]
    return tuple(kinds[(row + step) % len(kinds)] for row in range(rows))


def read_run(arguments: Arguments, world_size: int, base: Arguments = SMALL) -> Run:
    argv = ["--job.config_file", DEBUG_FILE, *base, *arguments]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=world_size, training=True)


def make_state(run: Run, mesh: Any) -> TrainState:
    parts = build_parts(run, mesh, CPU)
    optimizer = build_optimizer([pair for part in parts for pair in part.named_parameters()], run.config.optimizer)
    schedule = build_schedule(optimizer, run.config.lr_scheduler, run.spec.steps)
    state = TrainState(parts, optimizer, schedule, cast(Loader, FixedBatches(run, mesh.batch_rank)), CPU)
    if run.config.training.document_mask and dist.get_world_size() > 1:
        state.feed = Feed(dist.group.WORLD, run.spec.world_size // mesh.batch_degree)
    return state


def train(arguments: Arguments) -> PipelineTrace:
    run = read_run(arguments, dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    step_config = build_step_config(run, mesh, CPU, state.parts)
    trace = PipelineTrace(initial_weights=whole_weights(state))
    for _ in range(run.spec.steps):
        metrics = train_step(state, step_config, mesh)
        trace.losses.append(float(metrics.loss))
        trace.norms.append(float(metrics.grad_norm))
        trace.left_unsharded += unsharded_modules(state)
    trace.weights = whole_weights(state)
    trace.validation = validate(run, mesh, state)
    return trace


def validate(run: Run, mesh: Any, state: TrainState, rows: int = 2) -> float:
    """The mean loss of the same rows on all ranks: fewer than some schedules could train on."""
    divisor = Divisor(rows * run.spec.seq_len)
    forward = build_forward_backward(run, mesh, CPU, state.parts, rows, run.spec.seq_len, divisor=divisor)
    batch = FixedBatches(run, 0, step=1000).next()
    with torch.no_grad():
        loss = forward.evaluate(Batch(batch.tokens[:rows], batch.labels[:rows]))
    assert loss.requires_grad is False
    return float(mesh.reduce_sum(loss)) / mesh.batch_degree


def train_all(cases: list[Arguments]) -> list[PipelineTrace]:
    """Several cases on the same ranks, so that a test starts them once."""
    return [train(case) for case in cases]


def whole_weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: to_full_tensor(parameter) for part in state.parts for name, parameter in part.named_parameters()}


def unsharded_modules(state: TrainState) -> list[str]:
    """The modules whose parameters are still whole though they are cut over ranks."""
    found = []
    for part in state.parts:
        for name, module in part.named_modules():
            if isinstance(module, FSDPModule):
                groups = module._get_fsdp_state()._state_ctx.all_states
                found += [name for each in groups if _is_unsharded(each)]
    return found


def _is_unsharded(state: Any) -> bool:
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups
    return any(group is not None and group.is_unsharded for group in groups)
