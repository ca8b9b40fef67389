"""A tiny Llama, its batches, and a few steps of training through the real packages, on any layout. For tests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from clipping import clip_gradients
from torch import nn
from torch.distributed.tensor import DTensor

from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.config.model_spec import ModelSpec
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import ActivationCheckpoint, Compile, Optimizer, Parallelism, Training
from quadriga.models.registry import build_model, parallel_plan
from quadriga.optim.optimizer import build_optimizer
from quadriga.parallel.context_parallel import local_positions
from quadriga.parallel.data_parallel import set_gradient_sync
from quadriga.parallel.materialize import materialize
from quadriga.parallel.parallelize import parallelize
from quadriga.parallel.tensor_parallel import loss_context
from quadriga.train.loss import summed_cross_entropy

SPEC = ModelSpec(
    "llama3", "tiny", dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=56, vocab_size=99, rope_theta=1e4
)
GLOBAL_BATCH, SEQ_LEN, ROWS = 8, 16, 1  # rows of a micro-batch: two of them on four ranks
FLOAT32 = Training(mixed_precision_param="float32")
ALONE = Degrees()
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


def train(case: Case, steps: int = 3) -> TrainingTrace:
    """The steps as `quadriga.train` takes them: each rank adds its part of the mean loss over the global batch."""
    mesh = build_mesh(case.degrees, "cpu")
    model = make_model(case, mesh)
    optimizer = build_optimizer(model.named_parameters(), Optimizer(lr=1e-2))
    mine = slice(mesh.batch_rank * GLOBAL_BATCH // mesh.batch_degree, None)
    balancer = case.parallelism.context_parallel_load_balancer
    positions = local_positions(SEQ_LEN, mesh.cp.get_local_rank(), mesh.cp.size(), balancer)
    trace = TrainingTrace()
    for step in range(steps):
        share = GLOBAL_BATCH // mesh.batch_degree
        tokens, labels = (rows[mine][:share, positions] for rows in batch(step, case.spec.vocab_size))
        micro_batches = list(zip(tokens.split(case.rows), labels.split(case.rows), strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for number, (x, y) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            set_gradient_sync(model, reduce=case.reduce == "every_micro_batch", last=last)
            with loss_context(mesh.tp, case.parallelism)():
                loss = summed_cross_entropy(model(x, positions), y)
                loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
                (loss / (GLOBAL_BATCH * SEQ_LEN)).backward()
            total += loss.detach()
        trace.losses.append((mesh.reduce_sum(total) / (GLOBAL_BATCH * SEQ_LEN)).item())
        trace.dtypes |= {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}
        trace.norms.append(clip_gradients(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    trace.weights = {name: to_full_tensor(parameter) for name, parameter in model.named_parameters()}
    return trace


def train_all(cases: list[Case]) -> list[TrainingTrace]:
    """Several cases on the same ranks, so that a test starts them once."""
    return [train(case) for case in cases]


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
