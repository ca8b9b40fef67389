"""Six trials of the kill matrix; `make kill-matrix` runs the others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from launching import ROOT, launch_environ


@pytest.mark.slow
@pytest.mark.parametrize(("defect", "differs"), [("moments", {"losses", "state"}), ("data", {"losses", "documents"})])
def test_the_kill_matrix_finds_a_resume_that_forgets(defect, differs, tmp_path):
    """It could not fail otherwise. Trial 15 kills in step 9, so that the run goes on from a checkpoint."""
    command = [sys.executable, "benchmarks/kill_matrix.py", "--first", "15", "--trials", "1", "--layouts", "FSDP 2"]
    command += ["--modes", "disabled", "--single", "--results", str(tmp_path)]
    environ = launch_environ({"QUADRIGA_DEFECT": defect})
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (trial,) = [json.loads(line) for line in (tmp_path / "kill_matrix.jsonl").read_text().splitlines()]
    assert trial["struck"] == [True]
    assert differs <= set(trial["differs"])


def test_runs_killed_anywhere_end_as_the_undisturbed_one(tmp_path):
    command = [sys.executable, "benchmarks/kill_matrix.py", "--trials", "6", "--layouts", "FSDP 2"]
    command += ["--modes", "async", "--single"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        cwd=ROOT,
        env=launch_environ(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in (tmp_path / "kill_matrix.jsonl").read_text().splitlines()]
    assert [trial["differs"] for trial in trials] == [[]] * 6
    struck = [fault for trial in trials for fault, hit in zip(trial["faults"], trial["struck"], strict=False) if hit]
    assert len(struck) >= 6, "every trial kills something"
    assert {"step", "save", "manifest", "rename", "remove"} <= {fault["moment"] for fault in struck}
