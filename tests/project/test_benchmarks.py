"""Parts of the benchmark scripts that decide what they report."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402 (found by the line above)
import cpu_table  # noqa: E402
import data_speed  # noqa: E402
import scaling  # noqa: E402
from paired import estimate_median, is_precise  # noqa: E402

from quadriga import limits  # noqa: E402
from quadriga.cli.arguments import run_from_file  # noqa: E402


def test_a_cell_ends_when_its_interval_is_narrow() -> None:
    assert is_precise([1.0] * 6, 0.02)
    assert not is_precise([0.5, 1.5] * 3, 0.02)
    assert not is_precise([1.0] * 6, 0.0)


@pytest.mark.parametrize(
    ("cell", "ratios", "missed_by"),
    [
        (cpu_table.Cell("debug", "float32", False, False), [1.0] * 6, 0),
        (cpu_table.Cell("debug", "float32", False, False), [0.99] * 6, 0.01),
        (cpu_table.Cell("debug", "float32", True, True), [0.9, 0.9, 1.1, 1.1, 1.1, 1.1], 0.07),  # the lower end
        (cpu_table.Cell("debug", "bfloat16", True, True), [1.09] * 6, 0.01),
        (cpu_table.Cell("debug", "bfloat16", False, False), [1.02] * 6, 0),
        (cpu_table.Cell("debug", "bfloat16", True, False), [0.5] * 6, None),  # shown, without a target
    ],
)
def test_the_distance_of_a_cell_to_its_target(
    cell: cpu_table.Cell, ratios: list[float], missed_by: float | None
) -> None:
    assert cell.missed_by(estimate_median(ratios)) == (None if missed_by is None else pytest.approx(missed_by))


def test_the_table_has_a_row_for_each_cell() -> None:
    cells = list(cpu_table.all_cells(["debug-float32", "small-bfloat16"]))
    assert len(cells) == 6
    assert len(set(cells)) == 6


def made_runs() -> list[dict[str, object]]:
    keys = ("step_seconds", "tokens_per_second", "flops_per_second", "resident_bytes", "estimated_bytes")
    return [
        {"what": what, "value": value, **{key: float(value * number) for number, key in enumerate(keys, 1)}}
        for what in ("rows", "layers")
        for value in (2, 4)
    ]


def test_rates_are_multiples_of_the_first_row_of_a_sweep() -> None:
    rows = list(scaling.rows_of_runs(made_runs()))
    assert [row[0] for row in rows] == ["rows = 2", "rows = 4", "layers = 2", "layers = 4"]
    assert [row[2] for row in rows] == ["1.00", "2.00", "1.00", "2.00"]


def test_the_plot_is_an_svg_with_a_bar_for_each_figure() -> None:
    picture = ElementTree.fromstring(scaling.plot(made_runs()))
    assert len(picture.findall("{http://www.w3.org/2000/svg}rect")) == 4 + 2 * 4


def test_chunks_of_a_plan() -> None:
    """A matrix of 4,096 rows over 16,384 ranks has 4,096 shards with elements."""
    shards, keys = scaling.layout_of("HSDP", 16384)
    run = run_from_file(str(scaling.REFERENCE), 16384, ["--model.hf_assets_path=builtin:bytes", *keys])
    assert shards == 64
    assert scaling.chunks_of_plan(run, 64) == 3 * 64 * 291
    assert limits.PLAN_CHUNKS > 3 * 64 * 291
    assert scaling.chunks_of_plan(run, 16384) < 3 * 16384 * 291


@pytest.mark.more
def test_data_speed_measures_every_figure(tmp_path: Path) -> None:
    """Two ranks for a second, 100 shards, and little text. The speeds are those of a loaded machine."""
    figures = data_speed.measured(tmp_path, quick=True)
    json.dumps(figures)
    values = data_speed.compared(figures)
    assert set(values) == set(data_speed.TARGETS)
    assert all(value > 0 for value in values.values())
    assert {row["what"] for row in figures["text"]} >= {"library", "loader", "tokenize", "tokenize, fastokens"}
    assert figures["shards"]["ids"] == 100 * data_speed.SHARD_IDS
    assert figures["shards"]["files"] == 100
    assert figures["shards"]["memory"] > 50 << 20
    assert len(figures["wait"]["text"]["shares"]) == 2
    assert all(0 < share < 1 for wait in figures["wait"].values() for share in wait["shares"])


def test_a_figure_of_data_that_missed_its_target_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"met": {"wait of text": False, "wait of token files": True}}
    figures["wait"] = {"text": {"share": 0.02}, "token files": {"share": 0.0002}}
    monkeypatch.setattr(claims, "data_recorded", lambda: True)
    monkeypatch.setattr(claims, "result_figures", lambda name: figures)
    assert claims.FIGURES["wait of text"]() == "**missed**: 2.00 %"
    assert claims.FIGURES["wait of token files"]() == "0.02 %"
    assert data_speed.is_met("tokenize", 0.9)
    assert not data_speed.is_met("tokenize", 0.89)
    assert not data_speed.is_met("wait of text", 0.011)
