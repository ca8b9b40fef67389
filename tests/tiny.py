"""A tiny Llama, its batches, and a few steps of training through the real packages, on any layout. For tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.config.model_spec import ModelSpec
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training
from quadriga.data.document_borders import document_tensors
from quadriga.data.loader import IGNORE, Batch, Loader
from quadriga.data.streams import Cursor
from quadriga.models.registry import build_model, parallel_plan
from quadriga.optim.optimizer import build_optimizer
from quadriga.parallel.context_parallel import local_positions
from quadriga.parallel.materialize import materialize
from quadriga.parallel.parallelize import parallelize
from quadriga.parallel.tensor_parallel import loss_context
from quadriga.train.feed import Feed
from quadriga.train.loss import Divisor, summed_cross_entropy
from quadriga.train.state import TrainState
from quadriga.train.step import LocalShard, StepConfig, WholeForwardBackward, train_step

SPEC = ModelSpec(
    "llama3", "tiny", dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=56, vocab_size=99, rope_theta=1e4
)
GLOBAL_BATCH, SEQ_LEN, ROWS = 8, 16, 1  # rows of a micro-batch: two of them on four ranks
FLOAT32 = Training(mixed_precision_param="float32")
ALONE = Degrees()
CPU = torch.device("cpu")
DEFAULT_PARALLELISM = Parallelism()
NOT_COMPILED = Compile()
NO_RECOMPUTE = ActivationCheckpoint(mode="none")


@dataclass(frozen=True)
class Case:
    """One way of training the same model on the same batches."""

    degrees: Degrees = ALONE
    training: Training = FLOAT32
    parallelism: Parallelism = DEFAULT_PARALLELISM
    recompute: ActivationCheckpoint = NO_RECOMPUTE
    compile: Compile = NOT_COMPILED
    reduce: str = "once"
    spec: ModelSpec = SPEC
    reshard: bool = True
    rows: int = ROWS  # of a micro-batch
    documents: tuple[tuple[int, ...], ...] | None = None  # for each row of the batch, where documents begin after 0


@dataclass
class TrainingTrace:
    """What a rank saw: per step the loss of the global batch and the norm; at the end names, and whole weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    dtypes: set[tuple[torch.dtype, torch.dtype]] = field(default_factory=set)


def make_model(case: Case, mesh: Mesh) -> nn.Module:
    plan = parallel_plan(case.spec)
    with torch.device("meta"):
        model = build_model(case.spec)
    parallelize(
        model,
        plan,
        mesh,
        parallelism=case.parallelism,
        training=case.training,
        activation_checkpoint=case.recompute,
        compile=case.compile,
        reshard_after_forward=case.reshard,
        reshard_ends=case.parallelism.fsdp_reshard_after_forward == "always",
    )
    materialize(model, plan.parameters, 7, torch.device("cpu"))
    return model


def batch(step: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass
class Rows:
    """A loader of this rank's rows of the batch of each step."""

    mesh: Mesh
    vocab_size: int
    documents: tuple[tuple[int, ...], ...] | None = None
    step: int = 0
    waited: float = 0.0

    def snapshot(self) -> dict[int, Cursor]:
        return {}

    def next(self) -> Batch:
        self.step += 1
        tokens, labels = batch(self.step - 1, self.vocab_size)
        if self.documents is None:
            return Batch(self._own(tokens), self._own(labels))
        starts = self.documents[-self.step :] + self.documents[: -self.step]  # others in each step
        positions, borders = document_tensors(starts, SEQ_LEN)
        labels = without_next_document(labels, starts)
        own = [self._own(x) for x in (tokens, labels, positions, borders)]
        return Batch(*own[:2], positions=own[2], borders=own[3], tokens_read=own[0].numel())

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.mesh.batch_degree)[self.mesh.batch_rank]


def without_next_document(labels: torch.Tensor, starts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The labels without the first token of each document, which the last one before does not predict."""
    labels = labels.clone()
    for row, places in enumerate(starts):
        labels[row, [place - 1 for place in places]] = IGNORE
    return labels


def train(case: Case, steps: int = 3) -> TrainingTrace:
    """Steps of `quadriga.train`, with a constant learning rate."""
    mesh = build_mesh(case.degrees, "cpu")
    model = make_model(case, mesh)
    optimizer = build_optimizer(model.named_parameters(), Optimizer(lr=1e-2))
    balancer = case.parallelism.context_parallel_load_balancer
    positions = local_positions(SEQ_LEN, mesh.cp.get_local_rank(), mesh.cp.size(), balancer)
    trace, divisor = TrainingTrace(), Divisor(GLOBAL_BATCH * SEQ_LEN)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return to_whole(summed_cross_entropy(logits, labels)) / divisor.value

    def note_dtypes(*_: object) -> None:
        trace.dtypes |= {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}

    optimizer.register_step_pre_hook(note_dtypes)
    shard = LocalShard(CPU, positions, SEQ_LEN)
    whole = WholeForwardBackward(model, loss, loss_context(mesh.tp, case.parallelism), shard)
    step_config = StepConfig(whole, CPU, case.rows, GLOBAL_BATCH * SEQ_LEN, 1.0, case.reduce, divisor)
    loader = cast(Loader, Rows(mesh, case.spec.vocab_size, case.documents))
    state = TrainState((model,), optimizer, LambdaLR(optimizer, lambda _: 1.0), loader, CPU)
    if dist.is_initialized():
        state.feed = Feed(dist.group.WORLD, dist.get_world_size() // mesh.batch_degree)
    for _ in range(steps):
        metrics = train_step(state, step_config, mesh)
        trace.losses.append(metrics.loss.item())
        trace.norms.append(metrics.grad_norm.item())
    trace.weights = {name: to_full_tensor(parameter) for name, parameter in model.named_parameters()}
    return trace


def train_all(cases: list[Case]) -> list[TrainingTrace]:
    """Several cases on the same ranks, so that a test starts them once."""
    return [train(case) for case in cases]


def to_whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return to_whole(tensor).detach().clone()
