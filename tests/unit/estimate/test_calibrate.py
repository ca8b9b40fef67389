"""Rates measured in a run: of a real one, and of folders that do not tell them."""

from __future__ import annotations

import json
import sys

import pytest
from launching import ROOT, launch
from training import DEBUG_FILE, TINY

from quadriga.cli.main import main
from quadriga.metrics.jsonl import read_metrics


@pytest.mark.slow
def test_a_finished_run_calibrates_the_estimate(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    keys = [key for key in TINY if "profiling" not in key]
    keys += ["--training.steps=12", "--profiling.enable_profiling", "--profiling.profile_freq=12"]
    keys += ["--profiling.profiler_active=2", "--profiling.profiler_warmup=2", f"--job.dump_folder={folder}"]
    ended = launch([sys.executable, "-m", "quadriga.train", "--job.config_file", DEBUG_FILE, *keys], cwd=ROOT)
    assert ended.code == 0, ended.err
    foreseen = json.loads((folder / "estimate.json").read_text())
    assert foreseen["device"] == "cpu"
    assert foreseen["if_memory_runs_out"]

    command = ["estimate", str(folder / "config.toml"), "--ngpu=1", "--device=cpu", "--json"]
    command += ["--calibrate", str(folder)]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    steps = read_metrics(folder / "metrics.jsonl")
    measured = sorted(step["step_seconds"] for step in steps[2:])[len(steps) // 2 - 1]
    assert told["calibrated"] is True
    assert told["step_time_s"] == pytest.approx(measured, rel=0.25), "it predicts the run that it was measured in"

    for trace in folder.glob("profile_trace/**/*.json*"):
        trace.unlink()
    assert main(command) == 2
    assert "no trace of the profiler is there" in capsys.readouterr().err
    assert main([*command[: command.index("--calibrate") + 1], str(tmp_path / "nothing")]) == 2
    assert "cannot be read" in capsys.readouterr().err
