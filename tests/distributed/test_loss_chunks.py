"""With the loss in chunks every layout trains as it does without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training
from pipelines import CPU, Arguments, FixedBatches, PipelineTrace, make_state, pipeline, read_run, train_all
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quadriga.comm.mesh import build_mesh
from quadriga.train.build import build_step_config

KEY = "--parallelism."
# Pieces of 64 tokens, or of the 16 that a row of a pipeline has: not equally long.
CHUNKS: Arguments = ("--training.loss_chunks=3",)
TP = (f"{KEY}tensor_parallel_degree=2",)
CP = (f"{KEY}context_parallel_degree=2",)
DDP = (f"{KEY}data_parallel_replicate_degree=2", f"{KEY}data_parallel_shard_degree=1")
ALWAYS = (f"{KEY}fsdp_reshard_after_forward=always",)
WHOLE, GATHERED = (f"{KEY}no_enable_sequence_parallel",), (f"{KEY}disable_loss_parallel",)
TIED = ("--model.tie_embeddings",)
BF16 = ("--training.mixed_precision_param=bfloat16",)
OFFLOAD = ("--training.enable_cpu_offload",)
EVERY = ("--training.global_batch_size=16", f"{KEY}reduce_gradients=every_micro_batch")


def run(ranks: int, *cases: Arguments, timeout: float = 90) -> list[list[PipelineTrace]]:
    """Each case on all ranks: its traces by rank."""
    short = [(*case, "--training.steps=2") for case in cases]
    return [list(traces) for traces in zip(*run_ranks(train_all, ranks, short, timeout=timeout), strict=True)]


@pytest.fixture(scope="module")
def plain() -> dict[str, PipelineTrace]:
    """One process that makes all logits at once."""
    cases = {"": (), "tied": TIED, "accumulated": EVERY}
    return {name: traces[0] for name, traces in zip(cases, run(1, *cases.values()), strict=True)}


def assert_same_training(traces: list[PipelineTrace], reference: PipelineTrace) -> None:
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, rel=1e-6)
        assert trace.norms == pytest.approx(reference.norms, rel=1e-6)
        assert trace.validation == pytest.approx(reference.validation, rel=1e-6)
        assert not trace.left_unsharded
        for name, weight in trace.weights.items():
            expected = reference.weights[name]
            assert (weight - expected).norm() <= 1e-4 * expected.norm(), name


def compare(ranks: int, cases: list[Arguments], reference: PipelineTrace, timeout: float = 90) -> None:
    for traces in run(ranks, *((*case, *CHUNKS) for case in cases), timeout=timeout):
        assert_same_training(traces, reference)


def test_one_rank(plain: dict[str, PipelineTrace]) -> None:
    compare(1, [(), OFFLOAD], plain[""])


def test_two_ranks(plain: dict[str, PipelineTrace]) -> None:
    compare(2, [ALWAYS, TP, (*TP, *WHOLE, *GATHERED)], plain[""])
    compare(2, [TIED, (*TIED, *TP)], plain["tied"])


@pytest.mark.slow
def test_two_ranks_otherwise(plain: dict[str, PipelineTrace]) -> None:
    compare(2, [(), DDP, CP], plain[""])
    compare(2, [(*TIED, *ALWAYS), (*TIED, *TP, *GATHERED)], plain["tied"])


def test_a_pipeline(plain: dict[str, PipelineTrace]) -> None:
    schedules = ("GPipe", "1F1B", "ZBVZeroBubble")
    compare(2, [pipeline(2, schedule) for schedule in schedules], plain[""])


class TokensOfLogits(TorchDispatchMode):
    """The most rows of logits, as wide as the vocabulary or this rank's half of it, that any operation returned."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            own = made._local_tensor if isinstance(made, DTensor) else made
            if isinstance(own, torch.Tensor) and own.dim() and own.shape[-1] in (320, 160):
                self.most = max(self.most, own.numel() // own.shape[-1])
        return result


def tokens_of_logits(cases: list[Arguments]) -> list[int]:
    found = []
    for case in cases:
        settled = read_run(case, dist.get_world_size())
        mesh = build_mesh(settled.spec.degrees, "cpu")
        state = make_state(settled, mesh)
        forward = build_step_config(settled, mesh, CPU, state.parts).forward_backward
        batch = FixedBatches(settled, 0).next()
        four = type(batch)(batch.tokens[:4], batch.labels[:4])
        with TokensOfLogits() as logits:
            forward.train(four, reduce=True, last=True)
        found.append(logits.most)
    return found


def test_no_rank_has_logits_of_more_than_a_loss_chunk() -> None:
    halves = "--training.loss_chunks=2"  # not more: a gradient of the matrix is 32 words wide and looks like 32 tokens
    cases = [(*TP, *way, *more) for way in ((), GATHERED) for more in ((), (halves,))]
    for most in run_ranks(tokens_of_logits, 2, cases):
        assert most == [64, 32, 128, 64]  # gathered ones arrive as halves, one above the other


def test_bfloat16() -> None:
    """Of each chunk the logits and their gradients are rounded as those of the whole are."""
    chunked, whole = run(2, (*BF16, *CHUNKS), BF16)
    assert chunked[0].losses == pytest.approx(whole[0].losses, rel=1e-3)
    assert chunked[0].norms == pytest.approx(whole[0].norms, rel=1e-2)


@pytest.mark.slow
def test_four_ranks(plain: dict[str, PipelineTrace]) -> None:
    ways = ((), WHOLE, GATHERED, (*WHOLE, *GATHERED))
    hsdp = (f"{KEY}data_parallel_replicate_degree=2", f"{KEY}data_parallel_shard_degree=2")
    hsdp += ("--training.local_batch_size=2",)
    compare(4, [*((*TP, *way) for way in ways), (*TP, *CP), hsdp, (*TP, *DDP), (*TP, *OFFLOAD)], plain[""])
    compare(4, [(*TIED, *TP, *way) for way in ways], plain["tied"])
    splits = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    cases = [(*EVERY, *pipeline(2, schedule), *layout) for schedule in splits for layout in ((), DDP, TP)]
    compare(4, [EVERY, *cases, (*EVERY, *pipeline(2), *ALWAYS)], plain["accumulated"], timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "ranks", "case"),
    [
        ("aot_eager", 2, ()),
        ("aot_eager", 2, (*TP, *GATHERED)),
        ("aot_eager", 2, pipeline(2)),
        ("aot_eager", 2, TP),
        ("inductor", 1, ()),
        ("inductor", 2, TP),
    ],
)
def test_a_compiled_loss(backend: str, ranks: int, case: Arguments, plain: dict[str, PipelineTrace]) -> None:
    """In chunks of two lengths, in training and in validation."""
    compiled = ("--compile.enable", f"--compile.backend={backend}", "--compile.components=loss")
    compare(ranks, [(*compiled, *case)], plain[""], timeout=300)


FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")
FLOAT8_GATHER = (
    "--quantize.linear.float8.enable_fsdp_float8_all_gather",
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
)
WIDE = (*training.TINY, "--model.dim=64", "--training.steps=3", "--optimizer.lr=3e-3", "--training.local_batch_size=4")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FLOAT8_GATHER, TP, (*TIED, *TP)], ids=["gathered in float8", "TP", "tied, TP"])
def test_a_float8_output_layer(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Each chunk of the hidden states is scaled by itself, which is nearer and not the same."""
    pytest.importorskip("torchao.float8", reason="torchao is optional")
    whole = training.train(tmp_path / "whole", 2, *WIDE, *FLOAT8, *layout)
    chunked = training.train(tmp_path / "chunks", 2, *WIDE, *FLOAT8, *layout, *CHUNKS)
    assert training.largest_difference(chunked, whole, "loss") <= 5e-3
