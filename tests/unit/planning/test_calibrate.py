"""Rates measured in a run: of a real one, and of folders that do not tell them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, launch
from training import DEBUG_FILE, TINY

from quadriga.analysis.trace.busy import busy_seconds
from quadriga.cli.main import main
from quadriga.config.schema import Profiling
from quadriga.metrics.jsonl import read_metrics
from quadriga.planning.calibrate import seconds_a_step


def logged(folder: Path, steps: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """What is read of metrics that hold these attempts, steps and seconds."""
    records = [{"kind": "train", "attempt": a, "step": step, "step_seconds": took} for a, step, took in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_metrics(folder / "metrics.jsonl", required=("step_seconds",))


def test_steps_that_the_profiler_slowed_do_not_count(tmp_path: Path) -> None:
    """Cycles of 10: steps 1 and 2 warm up, 6 to 10 are profiled, and in 11 the trace is written."""
    slow = {1: 9.0, 2: 8.0, 6: 2.0, 7: 2.0, 8: 2.0, 9: 2.0, 10: 2.0, 11: 7.0}
    records = logged(tmp_path, [(1, step, slow.get(step, 1.0)) for step in range(1, 14)])
    profiled = Profiling(enable_profiling=True, profile_freq=10, profiler_warmup=2, profiler_active=3)
    assert seconds_a_step(records, profiled, tmp_path) == 1.0
    assert seconds_a_step(records, Profiling(), tmp_path) == 2.0, "they are like the others, for all that is known"


def test_a_resumed_run_is_timed_in_its_last_attempt(tmp_path: Path) -> None:
    steps = [(1, step, 3.0) for step in range(1, 9)] + [(2, step, 9.0 if step < 7 else 1.0) for step in range(5, 12)]
    assert seconds_a_step(logged(tmp_path, steps), Profiling(), tmp_path) == 1.0


def test_the_first_two_steps_warm_up(tmp_path: Path) -> None:
    records = logged(tmp_path, [(1, 1, 9.0), (1, 2, 8.0), (1, 3, 1.0), (1, 4, 1.0)])
    assert seconds_a_step(records, Profiling(), tmp_path) == 1.0


def test_a_trace_of_a_cpu_distinguishes_forward_from_backward(tmp_path: Path) -> None:
    """A product of 100 and attention of 50 go forward. Backward, of events of a kind the outermost counts: a product of
    150, with another within, and autograd's own function for attention, 130."""
    events = [
        ("user_annotation", "ProfilerStep#7", 0, 1000),
        ("cpu_op", "aten::mm", 10, 100),
        ("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 200, 50),
        ("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 400, 200),
        ("cpu_op", "aten::mm", 410, 150),
        ("cpu_op", "aten::mm", 420, 20),
        ("cpu_op", "autograd::engine::evaluate_function: ScaledDotProductFlashAttentionForCpuBackward0", 700, 130),
        ("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu_backward", 705, 120),
    ]
    keys = ("cat", "name", "ts", "dur")
    rows = [{"ph": "X", "pid": 1, "tid": 1, **dict(zip(keys, event, strict=True))} for event in events]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": rows}))
    found = busy_seconds(tmp_path / "trace.json")
    micro = 1e-6
    assert found["products"] == pytest.approx(250 * micro)
    assert found["forward_products"] == pytest.approx(100 * micro)
    assert found["attention"] == pytest.approx(180 * micro)
    assert found["forward_attention"] == pytest.approx(50 * micro)


@pytest.mark.slow
def test_a_finished_run_calibrates_the_estimate(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    keys = [key for key in TINY if "profiling" not in key]
    keys += ["--training.steps=12", "--profiling.enable_profiling", "--profiling.profile_freq=12"]
    keys += ["--profiling.profiler_active=2", "--profiling.profiler_warmup=2", f"--job.dump_folder={folder}"]
    ended = launch([sys.executable, "-m", "quadriga.train", "--job.config_file", DEBUG_FILE, *keys], cwd=ROOT)
    assert ended.code == 0, ended.err
    predicted = json.loads((folder / "estimate.json").read_text())
    assert predicted["device"] == "cpu"
    assert predicted["if_memory_runs_out"]

    command = ["estimate", str(folder / "config.toml"), "--ngpu=1", "--device=cpu", "--json"]
    command += ["--calibrate", str(folder)]
    assert main(command) == 0
    output = json.loads(capsys.readouterr().out)
    steps = read_metrics(folder / "metrics.jsonl")
    measured = sorted(step["step_seconds"] for step in steps[2:])[len(steps) // 2 - 1]
    assert output["calibrated"] is True
    assert output["step_time_s"] == pytest.approx(measured, rel=0.25), "it predicts the run that it was measured in"

    for trace in folder.glob("profile_trace/**/*.json*"):
        trace.unlink()
    assert main(command) == 2
    assert "the folder has no profiler trace" in capsys.readouterr().err
    assert main([*command[: command.index("--calibrate") + 1], str(tmp_path / "nothing")]) == 2
    assert "cannot be read" in capsys.readouterr().err
