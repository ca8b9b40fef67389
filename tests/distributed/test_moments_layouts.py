"""Moments in bfloat16 on many ranks, and in checkpoints: to the bit where float32 ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training
from training import TINY

from quadriga.checkpoint.stored import open_stored

NARROW = (*TINY, "--optimizer.state_dtype=bfloat16", "--training.mixed_precision_param=float32")
# Sums whose order does not matter: data-parallel layouts are then the same to the bit.
EXACT = (*NARROW, "--training.mixed_precision_reduce=float64")
SAVED = ("--checkpoint.enable", "--checkpoint.interval=2", "--lr_scheduler.total_steps=4")
TP = ("--parallelism.tensor_parallel_degree=2",)


def figures(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records]


def formats(folder: Path) -> dict[str, set[str]]:
    """The formats that a checkpoint holds each kind of the optimizer's tensors in."""
    found: dict[str, set[str]] = {}
    for name, entry in open_stored(str(folder), None).plan.tensors.items():
        if name.startswith("optimizer."):
            found.setdefault(name.rpartition(".")[2], set()).add(str(entry.dtype))
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """One rank, without a stop."""
    return figures(training.train(tmp_path_factory.mktemp("straight"), 1, *EXACT, *SAVED, "--training.steps=4"))


def test_shards_train_as_one_rank_does_and_go_on_where_they_stopped(
    straight: list[tuple[float, float]], tmp_path: Path
) -> None:
    training.train(tmp_path, 2, *EXACT, *SAVED, "--training.steps=2")
    held = formats(tmp_path / "checkpoint/step-2")
    assert held == {"step": {"torch.float32"}, "exp_avg": {"torch.bfloat16"}, "exp_avg_sq": {"torch.bfloat16"}}
    assert figures(training.train(tmp_path, 2, *EXACT, *SAVED, "--training.steps=4")) == straight


def test_a_checkpoint_goes_on_in_another_layout(straight: list[tuple[float, float]], tmp_path: Path) -> None:
    """From shards to one rank to the bit; from there to matrices cut in two, with the parameters on the host."""
    training.train(tmp_path, 2, *EXACT, *SAVED, "--training.steps=2")
    assert figures(training.train(tmp_path, 1, *EXACT, *SAVED, "--training.steps=3")) == straight[:3]
    last = training.train(tmp_path, 2, *EXACT, *SAVED, *TP, "--training.enable_cpu_offload", "--training.steps=4")
    assert figures(last)[3] == pytest.approx(straight[3], rel=1e-6)


def test_a_run_may_change_the_format_of_its_moments(straight: list[tuple[float, float]], tmp_path: Path) -> None:
    """They are rounded when they are read, once."""
    wide = (*EXACT, *SAVED, "--optimizer.state_dtype=float32")
    training.train(tmp_path, 1, *wide, "--training.steps=2")
    gone_on = figures(training.train(tmp_path, 1, *EXACT, *SAVED, "--training.steps=4"))
    assert gone_on == [pytest.approx(figure, rel=1e-3) for figure in straight]
    assert gone_on != straight


@pytest.mark.parametrize("implementation", ["foreach", pytest.param("for-loop", marks=pytest.mark.slow)])
def test_other_implementations(implementation: str, straight: list[tuple[float, float]], tmp_path: Path) -> None:
    chosen = f"--optimizer.implementation={implementation}"
    cut = figures(training.train(tmp_path, 2, *EXACT, *SAVED, chosen, "--training.steps=4"))
    assert cut == [pytest.approx(figure, rel=1e-5) for figure in straight]


@pytest.mark.slow
def test_weights_that_are_gathered_in_float8(tmp_path: Path) -> None:
    """torchao holds them in a tensor type of its own, and computes their scales after each step."""
    pytest.importorskip("torchao.float8", reason="torchao is optional")
    table = "--quantize.linear.float8"
    float8 = (
        *("--model.converters=quantize.linear.float8", f"{table}.emulate", f"{table}.enable_fsdp_float8_all_gather"),
        *(f"{table}.precompute_float8_dynamic_scale_for_fsdp", "--model.dim=64", "--training.steps=3"),
    )
    wide = training.train(tmp_path / "wide", 2, *NARROW, *float8, "--optimizer.state_dtype=float32")
    narrow = training.train(tmp_path / "narrow", 2, *NARROW, *float8)
    assert training.largest_difference(narrow, wide, "loss") <= 1e-3
    assert figures(narrow) != figures(wide)


def test_stochastic_rounding_is_the_same_on_shards_and_after_a_stop(tmp_path: Path) -> None:
    """Of weights and of moments, to the bit."""
    rounded = (*EXACT, *SAVED, "--training.dtype=bfloat16", "--optimizer.stochastic_rounding")
    alone = figures(training.train(tmp_path / "alone", 1, *rounded, "--training.steps=4"))
    training.train(tmp_path / "shards", 2, *rounded, "--training.steps=2")
    assert figures(training.train(tmp_path / "shards", 2, *rounded, "--training.steps=4")) == alone
