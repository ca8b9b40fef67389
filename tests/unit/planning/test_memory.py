"""Active memory at the peak: predicted beside that of the tensors which are alive in a rehearsal, layout by layout.

`benchmarks/estimates.py` prints the table for docs/estimates.md.
"""

from __future__ import annotations

import statistics

import pytest
from estimating import COMPUTE, RECOMPUTE, keys, run_of
from fake_ranks import on_fake_ranks, peak_of_passes

from quadriga.planning.memory import memory_of
from quadriga.planning.setup import Setup

SMALL = ("--model.vocab_size=512",)
TWICE, EACH = ("--training.global_batch_size=16",), {"reduce": "every_micro_batch"}
EIGHT = ("--model.n_layers=8", "--training.local_batch_size=8")
MEDIAN, WORST, PROMISED = 0.03, 0.08, 0.03
CASES = {
    "1, none": (1, 0, (), "none", "f32"),
    "1, full": (1, 0, SMALL, "full", "f32"),
    "1, op, bf16": (1, 0, (), "op", "bf16"),
    "1, every 2nd": (1, 0, SMALL, "2", "f32"),
    "FSDP 4, none": (4, 0, SMALL, "none", "f32"),
    "FSDP 4, op, bf16": (4, 0, (), "op", "bf16"),
    "FSDP 4, full": (4, 0, SMALL, "full", "bf16"),
    "FSDP 4, tied": (4, 0, (*SMALL, "--model.tie_embeddings"), "full", "f32"),
    "FSDP 4, prefetch 3": (4, 0, (*SMALL, "--parallelism.fsdp_prefetch=3"), "full", "bf16"),
    "FSDP 4, never": (4, 0, (*SMALL, *keys(reshard="never")), "full", "f32"),
    "FSDP 4, accumulated": (4, 0, ("--training.global_batch_size=32", *keys(reduce="once")), "full", "f32"),
    "FSDP 4, loss in pieces": (4, 0, ("--training.loss_chunks=4",), "op", "bf16"),
    "DDP 2": (2, 0, (*SMALL, *keys(rep=2, shard=1)), "none", "f32"),
    "TP 2": (2, 0, keys(tp=2), "none", "f32"),
    "TP 2, op, bf16": (2, 0, (*SMALL, *keys(tp=2)), "op", "bf16"),
    "TP 2, whole logits": (2, 0, keys(tp=2, whole_logits=True), "full", "f32"),
    "FSDP 2, TP 2": (4, 0, (*SMALL, *keys(tp=2)), "op", "f32"),
    "CP 2": (2, 0, (*SMALL, *keys(cp=2)), "none", "f32"),
    "CP 2, ring": (2, 0, (*SMALL, *keys(cp=2, method="ring")), "op", "bf16"),
    "CP 2, ulysses": (2, 0, (*SMALL, *keys(cp=2, method="ulysses")), "op", "f32"),
    "PP 2, first": (2, 0, (*SMALL, *keys(pp=2)), "none", "f32"),
    "PP 2, last": (2, 1, keys(pp=2), "none", "f32"),
    "PP 2, GPipe": (2, 0, (*SMALL, *keys(pp=2, schedule="GPipe")), "none", "f32"),
    "PP 2, GPipe, last": (2, 1, (*SMALL, *keys(pp=2, schedule="GPipe")), "none", "f32"),
    "PP 2, interleaved": (2, 0, (*SMALL, *keys(pp=2, schedule="Interleaved1F1B")), "none", "f32"),
    "PP 4, interleaved, full": (4, 1, (*SMALL, *EIGHT, *keys(pp=4, schedule="Interleaved1F1B")), "full", "f32"),
    "PP 2, interleaved, in parts": (2, 1, (*SMALL, *keys(pp=2, schedule="InterleavedZeroBubble")), "none", "bf16"),
    "PP 2, ZBV": (2, 0, (*SMALL, *keys(pp=2, schedule="ZBVZeroBubble")), "none", "f32"),
    "PP 2, ZBV, last": (2, 1, (*SMALL, *keys(pp=2, schedule="ZBVZeroBubble")), "none", "f32"),
    "PP 2, ZBV, full": (2, 1, (*SMALL, *keys(pp=2, schedule="ZBVZeroBubble")), "full", "f32"),
    "PP 2, ZBV, FSDP 2": (4, 2, (*SMALL, *keys(pp=2, schedule="ZBVZeroBubble")), "none", "bf16"),
    "PP 2, ZBV, every 2nd of a rank": (2, 0, (*SMALL, *keys(pp=2, schedule="ZBVZeroBubble")), "2", "f32"),
    "PP 2, DualPipeV, op": (2, 1, (*SMALL, *keys(pp=2, schedule="DualPipeV")), "op", "f32"),
    "PP 2, TP 2, ZBV": (4, 0, (*SMALL, *keys(pp=2, tp=2, schedule="ZBVZeroBubble")), "none", "f32"),
    "PP 2, FSDP 2": (4, 2, (*SMALL, *keys(pp=2)), "op", "f32"),
    "PP 2, FSDP 2, reduced each": (4, 3, (*SMALL, *TWICE, *keys(pp=2, reduce="every_micro_batch")), "op", "bf16"),
    "PP 2, FSDP 2, ZBV, each": (4, 3, (*SMALL, *TWICE, *keys(pp=2, schedule="ZBVZeroBubble", **EACH)), "none", "bf16"),
    "PP 2, FSDP 2, always": (4, 0, (*SMALL, *keys(pp=2, reshard="always")), "full", "bf16"),
    "PP 2, TP 2, ZBV, full": (4, 0, (*SMALL, *EIGHT, *keys(pp=2, tp=2, schedule="ZBVZeroBubble")), "full", "bf16"),
    "PP 2, accumulated": (2, 0, (*SMALL, "--training.global_batch_size=8", *keys(pp=2)), "full", "f32"),
    "PP 2, loss in pieces": (2, 1, ("--training.loss_chunks=4", *keys(pp=2)), "op", "f32"),
}


QUICK = ("1, op, bf16", "FSDP 4, full", "FSDP 4, prefetch 3", "TP 2, op, bf16", "PP 2, last", "PP 2, ZBV, FSDP 2")


def both(name: str) -> tuple[float, float]:
    """Bytes at the peak: measured, predicted; parameters and moments are in both."""
    ranks, rank, more, recompute, compute = CASES[name]
    run = run_of(*more, *RECOMPUTE[recompute], *COMPUTE[compute], ranks=ranks)
    memory = memory_of(Setup(run, "cpu"), rank // (ranks // run.spec.degrees.pp))
    state = memory.parameters + memory.moments
    passes = [moment.total for moment in memory.timeline if moment.name != "optimizer"]
    return on_fake_ranks(peak_of_passes, run, rank)[0] + state, max(passes)


def check(errors: dict[str, float]) -> None:
    assert statistics.median(map(abs, errors.values())) <= MEDIAN
    assert {name: error for name, error in errors.items() if abs(error) > WORST} == {}
    assert {name: error for name, error in errors.items() if abs(error) > PROMISED} == {}


def test_predicted_peaks_are_the_measured_ones() -> None:
    check({name: predicted / measured - 1 for name in QUICK for measured, predicted in [both(name)]})


@pytest.mark.slow
def test_all_predicted_peaks_are_the_measured_ones() -> None:
    check({name: predicted / measured - 1 for name in CASES for measured, predicted in [both(name)]})
