"""Linear layers in emulated float8, through the real trainer: alone, under FSDP, and under FSDP with TP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training
from training import TINY

pytest.importorskip("torchao.float8", reason="torchao is optional")

# Widths that are multiples of 16 also where two ranks share a matrix.
WIDE = (*TINY, "--model.dim=64", "--training.steps=6", "--optimizer.lr=3e-3", "--training.local_batch_size=4")
FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")
GATHERED = ("--quantize.linear.float8.enable_fsdp_float8_all_gather",)
GATHERED += ("--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",)
TP = ("--parallelism.tensor_parallel_degree=2",)
SAVED = ("--checkpoint.enable", "--checkpoint.interval=3")


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(training.train(tmp_path_factory.mktemp("plain"), 1, *WIDE))


def test_float8_stays_near_a_plain_run_and_a_checkpoint_knows_nothing_of_it(plain: list[float], tmp_path: Path) -> None:
    assert plain[-1] < plain[0] - 0.3
    by_name = (*SAVED, "--training.steps=3", "--comm.backend=gloo")  # which the unset backend is on a CPU
    gathered = losses(training.train(tmp_path / "a", 2, *WIDE, *FLOAT8, *GATHERED, *by_name))
    assert gathered == pytest.approx(plain[:3], rel=2e-2)
    assert gathered != pytest.approx(plain[:3], rel=1e-6)
    gone_on = losses(training.train(tmp_path / "a", 1, *WIDE, *SAVED))  # without the converter
    assert gone_on == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
def test_float8_under_tensor_parallelism(plain: list[float], tmp_path: Path) -> None:
    cut = losses(training.train(tmp_path, 2, *WIDE, *FLOAT8, *TP, "--model.print_after_conversion"))
    assert cut == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
def test_float8_gathered_under_tensor_parallelism(plain: list[float], tmp_path: Path) -> None:
    cut = losses(training.train(tmp_path, 4, *WIDE, *FLOAT8, *TP, *GATHERED))
    assert cut == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_every_recipe_on_every_layout(recipe: str, plain: list[float], tmp_path: Path) -> None:
    asked = (*FLOAT8, f"--quantize.linear.float8.recipe_name={recipe}")
    for ranks, layout in ((1, ()), (2, ()), (2, TP), (4, TP)):
        other = losses(training.train(tmp_path / f"{ranks}{len(layout)}", ranks, *WIDE, *asked, *layout))
        assert other == pytest.approx(plain, rel=2e-2)
