"""Context parallelism: attention over a sequence that is split is attention, and training with it is training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import GLOBAL_BATCH, SEQ_LEN, SPEC, Case, TrainingTrace, batch, make_model, to_full_tensor, train_all
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import TINY, largest_difference, train

from quadriga.comm.call_recorder import CallRecorder, RecordedCall
from quadriga.comm.mesh import build_mesh
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import ActivationCheckpoint, Compile, Parallelism, Training
from quadriga.metrics.jsonl import read_metrics
from quadriga.models.llama.model import CausalAttention
from quadriga.models.registry import build_model, parallel_plan
from quadriga.parallel.activation_checkpoint import apply_activation_checkpoint
from quadriga.parallel.attention_ring import ring_attention, ring_attention_backward
from quadriga.parallel.context_parallel import METHODS, apply_context_parallel, local_positions
from quadriga.parallel.materialize import materialize

BATCH, SEQ, HEADS, HEAD_DIM = 2, 32, 8, 8
BALANCERS = ("headtail", None)
SMALL = replace(SPEC, n_layers=2)
NONE = ActivationCheckpoint(mode="none")
FULL = ActivationCheckpoint(mode="full")
OP = ActivationCheckpoint(mode="selective", selective_ac_option="op")
AOT = Compile(enable=True, backend="aot_eager", components=("model",))
INDUCTOR = Compile(enable=True, backend="inductor", components=("model",))
BF16 = Training(mixed_precision_param="bfloat16")


@dataclass(frozen=True)
class Attention:
    """One way to share attention."""

    method: str
    balancer: str | None = "headtail"
    kv_heads: int = 8
    dtype: torch.dtype = torch.float32
    compiled: bool = False


def inputs(case: Attention) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result, of the whole sequence, lying in memory as the model has them."""
    generator = torch.Generator().manual_seed(5)
    heads = (HEADS, case.kv_heads, case.kv_heads, HEADS)
    return [torch.randn(BATCH, SEQ, n, HEAD_DIM, generator=generator).transpose(1, 2).to(case.dtype) for n in heads]


def attention_and_gradients(core: torch.nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *qkv, grad = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = core(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors_of_attention(cases: list[Attention]) -> list[list[float]]:
    """On each rank, by case: errors of the result and of the gradients of q, k and v, largest over largest entry."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for case in cases:
        model = nn.ModuleDict({"core": CausalAttention()})
        whole = attention_and_gradients(model["core"], [x.float() for x in inputs(case)])
        section = Parallelism(context_parallel_method=case.method, context_parallel_load_balancer=case.balancer)
        apply_context_parallel(model, ("core",), mesh, section)
        mine = local_positions(SEQ, dist.get_rank(), size, case.balancer)
        ours = attention_and_gradients(model["core"], [x[:, :, mine] for x in inputs(case)])
        assert all(x.dtype == case.dtype for x in ours)
        pairs = zip(ours, whole, strict=True)
        found.append([((a.float() - b[:, :, mine]).abs().max() / b.abs().max()).item() for a, b in pairs])
        with torch.no_grad():
            assert torch.equal(model["core"](*(x[:, :, mine] for x in inputs(case)[:3])), ours[0])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_of_a_shared_sequence_is_attention(ranks: int) -> None:
    exact = [
        Attention(method, balancer, kv_heads)
        for method, balancer, kv_heads in product(METHODS, BALANCERS, (8, 4, 2, 1))
        if method != "ulysses" or kv_heads % ranks == 0
    ]
    rounded = [Attention(method, balancer, 4, torch.bfloat16) for method, balancer in product(METHODS, BALANCERS)]
    for errors in run_ranks(errors_of_attention, ranks, exact + rounded):
        for case, found in zip(exact, errors, strict=False):
            assert max(found) <= 2e-6, case
        for case, found in zip(rounded, errors[len(exact) :], strict=True):
            assert max(found) <= 1e-2, case


def by(method: str, balancer: str | None = "headtail") -> Parallelism:
    return Parallelism(context_parallel_method=method, context_parallel_load_balancer=balancer)


def small(degrees: Degrees, method: str = "allgather", balancer: str | None = "headtail", **more: Any) -> Case:
    return Case(degrees, parallelism=by(method, balancer), **{"spec": SMALL, "rows": 4, **more})


def assert_same_training(traces: list[TrainingTrace], reference: TrainingTrace, tolerance: float = 1e-6) -> None:
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, rel=tolerance)
        assert trace.norms == pytest.approx(reference.norms, rel=tolerance)
        assert list(trace.weights) == list(reference.weights)  # the same names in the same order
        assert trace.losses == traces[0].losses  # all ranks report the same numbers


def train_and_compare(cases: list[Case], ranks: int, reference: TrainingTrace, tolerance: float = 1e-6) -> None:
    for traces in zip(*run_ranks(train_all, ranks, cases, timeout=300), strict=True):
        assert_same_training(list(traces), reference, tolerance)


@pytest.fixture(scope="module")
def alone() -> list[TrainingTrace]:
    """One rank in float32, and in bfloat16."""
    return run_ranks(train_all, 1, [small(Degrees()), small(Degrees(), training=BF16)])[0]


@pytest.mark.slow
def test_two_ranks_that_share_sequences_train_as_one(alone: list[TrainingTrace]) -> None:
    cp = Degrees(cp=2)
    cases = [small(cp, method, balancer) for method, balancer in product(METHODS, BALANCERS)]
    cases += [small(cp, method, recompute=OP) for method in METHODS]
    cases += [small(cp, "ring", rows=2, reduce="every_micro_batch", recompute=FULL), small(cp, rows=2, reshard=False)]
    cases += [small(cp, "ring", compile=AOT, recompute=OP)]
    train_and_compare(cases, 2, alone[0])


@pytest.mark.slow
def test_four_ranks_that_share_sequences_train_as_one(alone: list[TrainingTrace]) -> None:
    wide, cut, copied = Degrees(cp=4), Degrees(dp_shard=2, cp=2), Degrees(dp_replicate=2, cp=2)
    cases = [small(wide), small(wide, "ring"), small(wide, "ring", None, recompute=OP)]
    cases += [small(cut, method, rows=2, recompute=OP) for method in METHODS]
    cases += [small(copied, "ring"), small(copied, rows=2, reduce="every_micro_batch")]
    train_and_compare(cases, 4, alone[0])
    train_and_compare([small(cut, method, training=BF16) for method in METHODS], 4, alone[1], tolerance=5e-3)


def opcheck_ring() -> None:
    documents = torch.tensor([[0, 3, SEQ], [0, SEQ, SEQ]], dtype=torch.int32)
    for dtype, pieces, borders in product((torch.float32, torch.bfloat16), (1, 2), (None, documents)):
        q, k, v, grad = (x[:, :, : SEQ // 2] for x in inputs(Attention("ring", kv_heads=4, dtype=dtype)))
        ring = (borders, dist.get_rank(), dist.get_world_size(), pieces, dist.group.WORLD.group_name)
        out, lse = ring_attention(q, k, v, *ring)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ring_attention, (q, k, v, *ring), test_utils=checks)
        torch.library.opcheck(ring_attention_backward, (grad, q, k, v, out, lse, *ring), test_utils=checks)


def test_the_ring_keeps_torchs_rules() -> None:
    """Schema, autograd, and kernels without numbers, strides included: compiled code relies on them."""
    run_ranks(opcheck_ring, 2)


def plain_model(section: Parallelism, recompute: ActivationCheckpoint) -> nn.Module:
    """The small model, of which nothing but the sequence is cut."""
    with torch.device("meta"):
        model = build_model(SMALL)
    plan = parallel_plan(SMALL)
    apply_context_parallel(model, plan.attention_units, init_device_mesh("cpu", (dist.get_world_size(),)), section)
    apply_activation_checkpoint(model, plan.recompute_units, recompute)
    materialize(model, plan.parameters, 7, torch.device("cpu"))
    return model


def calls_of_a_layer(
    methods: tuple[str, ...], modes: tuple[ActivationCheckpoint, ...]
) -> dict[tuple[str, int], Counter[RecordedCall]]:
    """What a layer sends in one forward and backward pass, by method and number of the mode."""
    calls = {}
    tokens, _ = batch(0, SMALL.vocab_size)
    positions = local_positions(SEQ_LEN, dist.get_rank(), dist.get_world_size(), "headtail")
    for method, (number, mode) in product(methods, enumerate(modes)):
        model = plain_model(by(method), mode)
        with CallRecorder({frozenset(range(dist.get_world_size())): "cp"}) as recorder:
            model(tokens[:, positions], positions).sum().backward()
        counts = Counter(recorder.calls)
        assert all(count % SMALL.n_layers == 0 for count in counts.values())
        calls[method, number] = Counter({call: count // SMALL.n_layers for call, count in counts.items()})
    return calls


@pytest.mark.parametrize("cp", [2, 4])
def test_a_layer_sends_what_the_table_says(cp: int) -> None:
    q = GLOBAL_BATCH * SEQ_LEN // cp * SMALL.dim * 4
    kv = 2 * q * SMALL.n_kv_heads // SMALL.n_heads
    methods = {name: METHODS[name] for name in METHODS if name != "ulysses" or SMALL.n_kv_heads % cp == 0}
    # A gather and its reverse count with the whole of what is gathered.
    gather, scatter = RecordedCall("all_gather", "cp", cp * kv), RecordedCall("reduce_scatter", "cp", cp * kv)
    send, exchanges = (
        RecordedCall("all_to_all", "cp", kv),
        [RecordedCall("all_to_all", "cp", q + kv), RecordedCall("all_to_all", "cp", q)],
    )
    forward = {"allgather": {gather: 1}, "ring": {send: cp - 1}, "ulysses": dict.fromkeys(exchanges, 1)}
    backward = {"allgather": {scatter: 1}, "ring": {send: 2 * (cp - 1)}, "ulysses": forward["ulysses"]}
    for found in run_ranks(calls_of_a_layer, cp, tuple(methods), (NONE, FULL, OP)):
        for method in methods:
            once = Counter(forward[method]) + Counter(backward[method])
            twice = once + Counter(forward[method])
            assert found[method, 0] == once
            assert found[method, 1] == twice
            assert found[method, 2] == (twice if method == "allgather" else once)


def initial_weights() -> dict[str, torch.Tensor]:
    degrees = Degrees(cp=dist.get_world_size())
    model = make_model(small(degrees), build_mesh(degrees, "cpu"))
    return {name: to_full_tensor(parameter) for name, parameter in model.named_parameters()}


def test_initial_weights_and_names_are_those_of_one_rank() -> None:
    (one,), two = run_ranks(initial_weights, 1), run_ranks(initial_weights, 2)
    for weights in two:
        assert list(weights) == list(one)
        assert all(torch.equal(weights[name], one[name]) for name in one)


def rehearse() -> None:
    """A pass of rank 3 of 8 in which no tensor holds anything and nothing is sent."""
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    for method, balancer in product(METHODS, BALANCERS):
        model = nn.ModuleDict({"core": CausalAttention()})
        apply_context_parallel(model, ("core",), mesh, by(method, balancer))
        with FakeTensorMode():
            q, k, v = (torch.empty(2, heads, 4096, 16, requires_grad=True) for heads in (16, 8, 8))
            out = model["core"](q, k, v)
            assert out.shape == q.shape
            out.sum().backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_a_rehearsal_runs_every_method() -> None:
    run_ranks(rehearse, 1, backend=None)


CP = ("--parallelism.context_parallel_degree=2", "--training.steps=3")
VALIDATION = (
    *("--validation.enable", "--validation.dataset=builtin_validation", "--validation.steps=2"),
    *("--validation.freq=2", "--validation.seq_len=16"),
)


def test_the_trainer_with_validation(tmp_path: Path) -> None:
    """Validation sequences may be of another length. One rank sees in a batch as many rows as two that share them."""
    alone = train(tmp_path / "one", 1, *TINY, *VALIDATION, "--training.steps=3", "--validation.local_batch_size=2")
    shared = train(tmp_path / "two", 2, *TINY, *VALIDATION, *CP, "--validation.local_batch_size=2")
    assert largest_difference(shared, alone, "loss") <= 1e-6
    assert largest_difference(shared, alone, "grad_norm") <= 1e-6
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl", kind="validation") for name in ("two", "one"))
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs] == [64, 64]
    assert largest_difference(ours, theirs, "loss") <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("compile", [AOT, INDUCTOR], ids=["aot_eager", "inductor"])
def test_compiled_blocks_that_share_sequences(compile: Compile, alone: list[TrainingTrace]) -> None:
    cp = Degrees(cp=2)
    cases = [small(cp, method, compile=compile, recompute=mode) for method, mode in product(METHODS, (NONE, OP))]
    cases += [small(cp, "ring", None, compile=compile, recompute=FULL)]
    train_and_compare(cases, 2, alone[0], tolerance=2e-6)
    train_and_compare([small(Degrees(dp_shard=2, cp=2), method, compile=compile) for method in METHODS], 4, alone[0])
