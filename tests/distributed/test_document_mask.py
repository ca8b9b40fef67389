"""Documents packed into rows train as each of them alone, on every layout.

The oracle is the plain model on one document after another, which knows neither masks nor positions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from pipelines import CPU, Arguments, document_starts, make_state, pipeline, read_run, whole_weights
from ranks import run_ranks
from tiny import to_full_tensor

from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.config import Run
from quadriga.models.registry import build_model
from quadriga.train.build import build_step_config
from quadriga.train.loss import summed_cross_entropy
from quadriga.train.state import TrainState
from quadriga.train.step import train_step

MASK: Arguments = (
    *("--training.document_mask=true", "--training.global_batch_size=16", "--optimizer.lr=1e-30"),
    *("--training.max_norm=0",),
)
STEPS = 2


class Trace(NamedTuple):
    """Of each step: the loss, the global norm, the gradients as whole tensors, and the work of attention."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]
    work: list[tuple[float, float]]


def sharp_state(run: Run, mesh: Mesh) -> TrainState:
    """Initial queries and keys are so small that a token hardly cares which tokens it sees. Here they are larger."""
    state = make_state(run, mesh)
    with torch.no_grad():
        for part in state.parts:
            for name, parameter in part.named_parameters():
                parameter.mul_(10 if ".attention." in name else 1)
    return state


def trace(arguments: Arguments) -> Trace:
    """Steps of the trainer with hardly any learning rate, so that each has the gradients of the same weights."""
    run = read_run((*MASK, *arguments), dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = sharp_state(run, mesh)
    step_config = build_step_config(run, mesh, CPU, state.parts)
    found = Trace([], [], [], [])

    def keep(*_: object) -> None:
        named = [pair for part in state.parts for pair in part.named_parameters()]
        found.gradients.append({name: to_full_tensor(p.grad).float() for name, p in named if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    for _ in range(STEPS):
        metrics = train_step(state, step_config, mesh)
        found.losses.append(float(metrics.loss))
        found.norms.append(float(metrics.grad_norm))
        assert metrics.attention is not None
        found.work.append((float(metrics.attention[0]), float(metrics.attention[1])))
    return found


def trace_all(cases: list[Arguments]) -> list[Trace]:
    return [trace(case) for case in cases]


def alone() -> Trace:
    """Each document by itself, through the plain model, with the weights of the run."""
    run = read_run(MASK, 1)
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = sharp_state(run, mesh)
    model = build_model(run.spec.model)
    model.load_state_dict(whole_weights(state))
    unmasked = read_run(tuple(each for each in MASK if "document_mask" not in each), 1)
    batches = make_state(unmasked, mesh).loader
    found = Trace([], [], [], [])
    for step in range(1, STEPS + 1):
        batch = batches.next()
        starts = document_starts(step, run.spec.global_batch_size, run.spec.seq_len)
        total, counted, seen = torch.zeros(()), 0, 0
        for row, marks in enumerate(starts):
            for first, after in zip((0, *marks), (*marks, run.spec.seq_len), strict=True):
                last = after == run.spec.seq_len  # of the row: its label is the next token of the same document
                seen += sum(range(1, after - first + 1))
                labels = batch.labels[row : row + 1, first : after if last else after - 1]
                if labels.numel():
                    logits = model(batch.tokens[row : row + 1, first:after])[:, : labels.shape[1]]
                    total = total + summed_cross_entropy(logits, labels)
                    counted += labels.numel()
        loss = total / counted
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        found.losses.append(loss.item())
        found.norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))))
        found.gradients.append(gradients)
        found.work.append((seen, 1.0))
    return found


@pytest.fixture(scope="module")
def oracle() -> Trace:
    return run_ranks(alone, 1)[0]


def compare(ranks: int, cases: list[Arguments], oracle: Trace, timeout: float = 300.0) -> None:
    """Loss <= 1e-6, the gradient <= 1e-6 of its norm, each tensor <= 1e-5 of its norm."""
    by_rank = run_ranks(trace_all, ranks, cases, timeout=timeout)
    for case, traces in zip(cases, zip(*by_rank, strict=True), strict=True):
        for ours in traces:
            assert ours.losses == pytest.approx(oracle.losses, rel=1e-6), case
            assert ours.norms == pytest.approx(oracle.norms, rel=1e-6), case
            assert [seen for seen, _ in ours.work] == [seen for seen, _ in oracle.work], case
        for step, expected in enumerate(oracle.gradients):
            mine = {name: tensor for ours in traces for name, tensor in ours.gradients[step].items()}
            assert mine.keys() == expected.keys(), case
            differences = {name: (mine[name] - expected[name]).norm().item() for name in expected}
            whole = sum(each**2 for each in differences.values()) ** 0.5
            assert whole <= 1e-6 * oracle.norms[step], (case, whole / oracle.norms[step])
            for name, difference in differences.items():
                assert difference <= 1e-5 * expected[name].norm().item(), (case, name)


def by(**degrees: object) -> Arguments:
    """Arguments of `[parallelism]`; `fsdp` and `cp` stand for the longer names."""
    names = {
        "hsdp": "data_parallel_replicate_degree",
        "fsdp": "data_parallel_shard_degree",
        "tp": "tensor_parallel_degree",
        "cp": "context_parallel_degree",
        "method": "context_parallel_method",
        "balancer": "context_parallel_load_balancer",
    }
    return tuple(f"--parallelism.{names[name]}={value}" for name, value in degrees.items())


FULL = ("--activation_checkpoint.mode=full",)
OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
CHUNKS = ("--training.loss_chunks=3",)
AOT = ("--compile.enable=true", "--compile.backend=aot_eager")
SMALL_BATCH = ("--training.local_batch_size=2",)
NONE = "none"


def test_one_and_two_ranks_train_documents_as_alone(oracle: Trace) -> None:
    compare(1, [(), FULL, (*AOT, *OP), (*CHUNKS, *SMALL_BATCH)], oracle)
    cases = [by(fsdp=2), by(tp=2), by(cp=2, method="ring"), by(cp=2), pipeline(2), by(cp=2, method="ulysses")]
    compare(2, cases, oracle)


def weights_of(mask: bool) -> list[torch.Tensor]:
    """The weights after some steps, in which each row is one document."""
    import pipelines

    pipelines.document_starts = lambda step, rows, seq_len: ((),) * rows
    run = read_run((f"--training.document_mask={str(mask).lower()}", *FULL), dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    step_config = build_step_config(run, mesh, CPU, state.parts)
    for _ in range(STEPS):
        train_step(state, step_config, mesh)
    return list(whole_weights(state).values())


def test_one_document_per_row_trains_as_no_mask_to_the_bit() -> None:
    for masked, plain in zip(run_ranks(weights_of, 2, True), run_ranks(weights_of, 2, False), strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(masked, plain, strict=True))


@pytest.mark.slow
def test_two_ranks_train_documents_as_alone(oracle: Trace) -> None:
    cases = [
        by(hsdp=2),
        (*by(tp=2), *CHUNKS, *OP),
        (*by(tp=2), "--parallelism.enable_sequence_parallel=false"),
        (*by(fsdp=2), *AOT, *OP),
        (*by(cp=2, method="ring", balancer=NONE), *OP),
        (*by(cp=2, balancer=NONE), *OP),
        (*by(cp=2, method="ring"), *AOT, *FULL),
        (*by(cp=2), *AOT),
        (*pipeline(2, "GPipe"), *CHUNKS),
        *((*pipeline(2, name), *OP) for name in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")),
        *(pipeline(2, name) for name in ("LoopedBFS", "DualPipeV")),
    ]
    compare(2, cases, oracle)


@pytest.mark.slow
def test_four_ranks_train_documents_as_alone(oracle: Trace) -> None:
    cases = [
        by(hsdp=2, fsdp=2),
        by(fsdp=2, tp=2),
        by(cp=4, method="ring"),
        (*by(cp=4, balancer=NONE), *FULL),
        by(fsdp=2, cp=2, method="ring"),
        by(tp=2, cp=2),
        by(fsdp=2, cp=2, method="ulysses"),
        (*pipeline(2), *by(cp=2, method="ring")),
        (*pipeline(2, "ZBVZeroBubble"), *by(tp=2)),
        (*pipeline(2), *by(fsdp=2), *AOT),
    ]
    compare(4, cases, oracle)


@pytest.mark.slow
def test_all_axes_together_train_documents_as_alone(oracle: Trace) -> None:
    compare(32, [(*by(hsdp=2, fsdp=2, tp=2, cp=2, method="ring"), *pipeline(2))], oracle, timeout=600)
