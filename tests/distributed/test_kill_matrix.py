"""Six trials of the kill matrix; `make kill-matrix` runs the others."""

from __future__ import annotations

import json
import subprocess
import sys

from launching import ROOT, launch_environ


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
