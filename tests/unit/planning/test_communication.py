"""What a step sends: kind, axis, calls and bytes are those that a fake group sees, on many layouts.

On real ranks: tests/distributed/test_collective_counts.py.
"""

from __future__ import annotations

import pytest
from estimating import COMPUTE, RECOMPUTE, by_group, keys, run_of
from fake_ranks import on_fake_ranks, recorded_step

from quadriga.planning.communication import CollectiveCalls

SMALL = ("--model.vocab_size=512", "--model.n_layers=4", "--model.n_heads=8", "--model.n_kv_heads=4")
TWICE = ("--training.global_batch_size=16",)  # two passes of a pipeline over two batch ranks
EVEN = tuple(f"--parallelism.pipeline_parallel_{end}_stage_less_layers=0" for end in ("first", "last"))
FOUR_STAGES = ("--model.n_layers=8", "--parallelism.pipeline_parallel_layers_per_stage=1", *EVEN)
LAYOUTS = {
    "FSDP 4": (4, keys(), "none", "f32"),
    "FSDP 3, uneven": (3, (), "none", "f32"),
    "FSDP 4, bf16, op": (4, (), "op", "bf16"),
    "FSDP 4, always": (4, keys(reshard="always"), "full", "f32"),
    "FSDP 4, never": (4, keys(reshard="never"), "2", "f32"),
    "FSDP 4, accumulated": (4, ("--training.global_batch_size=48", *keys(reduce="once")), "none", "f32"),
    "FSDP 4, reduced each": (4, ("--training.global_batch_size=48", *keys(reduce="every_micro_batch")), "op", "bf16"),
    "FSDP 4, loss chunks": (4, ("--training.loss_chunks=4",), "op", "f32"),
    "FSDP 4, tied": (4, ("--model.tie_embeddings",), "op", "f32"),
    "HSDP 2x2": (4, keys(rep=2), "none", "f32"),
    "DDP 4": (4, keys(rep=4, shard=1), "none", "bf16"),
    "TP 4": (4, keys(tp=4), "none", "f32"),
    "TP 2, full": (2, keys(tp=2), "full", "f32"),
    "TP 2, op, bf16": (2, keys(tp=2), "op", "bf16"),
    "TP 2, whole sequence": (2, keys(tp=2, sp=False), "op", "f32"),
    "TP 2, whole logits": (2, keys(tp=2, whole_logits=True), "full", "f32"),
    "FSDP 2, TP 2, accumulated": (4, ("--training.global_batch_size=16", *keys(tp=2)), "op", "f32"),
    "CP 2": (2, keys(cp=2), "full", "f32"),
    "CP 2, ring": (2, keys(cp=2, method="ring"), "full", "bf16"),
    "CP 4, ring, op": (4, keys(cp=4, method="ring"), "op", "f32"),
    "CP 2, ulysses": (2, keys(cp=2, method="ulysses"), "op", "f32"),
    "CP 2, ulysses, full": (2, keys(cp=2, method="ulysses"), "full", "f32"),
    "FSDP 2, CP 2, TP 2": (8, keys(cp=2, tp=2), "op", "f32"),
    "PP 2": (2, keys(pp=2), "none", "f32"),
    "PP 4, GPipe": (4, keys(pp=4, schedule="GPipe"), "full", "f32"),
    "PP 2, interleaved": (2, keys(pp=2, schedule="Interleaved1F1B"), "none", "f32"),
    "PP 2, ZBV": (2, keys(pp=2, schedule="ZBVZeroBubble"), "none", "f32"),
    "PP 2, FSDP 2": (4, keys(pp=2), "op", "bf16"),
    "PP 2, FSDP 2, reduced each": (4, (*TWICE, *keys(pp=2, reduce="every_micro_batch")), "op", "bf16"),
    "PP 2, FSDP 2, interleaved, accumulated": (4, (*TWICE, *keys(pp=2, schedule="Interleaved1F1B")), "op", "f32"),
    "PP 2, FSDP 2, four stages a rank": (4, (*FOUR_STAGES, *keys(pp=2, schedule="Interleaved1F1B")), "none", "bf16"),
    "PP 2, TP 2, ZBV, full": (4, keys(pp=2, tp=2, schedule="ZBVZeroBubble"), "full", "bf16"),
    # one block in each of the two stages of a rank: the second one is recomputed
    "PP 2, TP 2, ZBV, every 2nd": (4, (*EVEN, *keys(pp=2, tp=2, schedule="ZBVZeroBubble")), "2", "f32"),
    "PP 2, HSDP 2x2, DualPipeV": (8, keys(pp=2, rep=2, schedule="DualPipeV", reduce="every_micro_batch"), "op", "bf16"),
    "PP 2, TP 2": (4, keys(pp=2, tp=2), "op", "f32"),
    "all axes": (16, keys(pp=2, rep=2, cp=2, tp=2), "op", "bf16"),
}


QUICK = {
    "FSDP 4, bf16, op",
    "TP 2, op, bf16",
    "CP 2, ring",
    "PP 2, FSDP 2",
    "all axes",
    "PP 2, TP 2, ZBV, every 2nd",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_step_sends_what_is_predicted(name: str) -> None:
    ranks, layout, recompute, compute = LAYOUTS[name]
    run = run_of(*SMALL, *layout, *RECOMPUTE[recompute], *COMPUTE[compute], ranks=ranks)
    looked_at = (0, ranks - 1) if run.spec.degrees.pp > 1 else (0,)
    for rank, recorded in zip(looked_at, on_fake_ranks(recorded_step, run, *looked_at), strict=True):
        assert recorded == by_group(run, rank), f"rank {rank}"


EIGHT_B = ("--model.flavor=8B", "--model.hf_assets_path=x", "--training.seq_len=512", "--training.local_batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(4, ()), (8, keys(tp=2)), (64, keys(tp=4, cp=2, rep=2))])
def test_8b_sends_what_is_predicted(ranks: int, layout: tuple[str, ...]) -> None:
    run = run_of(*layout, *RECOMPUTE["op"], ranks=ranks, base=EIGHT_B)
    assert on_fake_ranks(recorded_step, run, 0) == [by_group(run, 0)]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all_gather", 1500.0),
        ("reduce_scatter", 1500.0),
        ("all_to_all", 1500.0),
        ("all_reduce", 3000.0),
        ("send", 2000.0),
    ],
)
def test_what_a_ring_of_four_sends(kind: str, sent: float) -> None:
    """(n - 1) / n of the bytes; an all-reduce is a reduce-scatter and an all-gather; a message is sent whole."""
    assert CollectiveCalls("shard", kind, 2.0, 1000.0, 4, "forward", "x").wire_bytes == sent
