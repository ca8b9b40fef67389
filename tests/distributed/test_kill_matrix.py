"""Six trials of the kill matrix; `make kill-matrix` runs the others."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, launch_environ
from ranks import RankError, run_ranks
from training import DEBUG_FILE, one_rank

sys.path.append(str(ROOT / "benchmarks"))
import kill_matrix  # found by the line above

real_start = kill_matrix.start_run


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


def rank_with_strike(argv: list[str], strike: dict[str, Any] | None) -> int:
    """A rank that kills as `benchmarks/faults` says of launched ones."""
    if strike is not None and int(os.environ["RANK"]) == strike["rank"]:
        os.environ["QUADRIGA_FAULT"] = json.dumps(strike)
        faults = runpy.run_path(str(ROOT / "benchmarks/faults/sitecustomize.py"))
        name, patch = faults["PATCHES"][strike["moment"]]
        if name in sys.modules:  # otherwise it is patched when it is imported
            patch(sys.modules[name])
    return one_rank(argv)


def fork_unless_launched(folder: Path, layout: str, mode: str, strike: dict[str, Any] | None = None) -> int:
    """A start in which the launcher or torchrun is killed is a real launch, and so is all of the first trial; the
    others are forked ranks, which do the same without importing torch anew."""
    if folder.name == "trial-0" or (strike is not None and strike["victim"] in ("launcher", "torchrun")):
        return real_start(folder, layout, mode, strike)
    ranks, keys = kill_matrix.LAYOUTS[layout]
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *kill_matrix.MODEL, *keys]
    argv += [f"--checkpoint.async_mode={mode}"]
    try:
        return max(run_ranks(rank_with_strike, ranks, argv, strike, timeout=300, backend=None))
    except RankError as error:
        if strike is None or "died with exit code -9" not in str(error):
            raise
        return 1


def test_runs_killed_anywhere_end_as_the_undisturbed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kill_matrix, "start_run", fork_unless_launched)
    options = ["--trials", "6", "--layouts", "FSDP 2", "--modes", "async", "--single", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/kill_matrix.py", *options])
    for name, value in launch_environ().items():
        monkeypatch.setenv(name, value)
    assert kill_matrix.main() == 0, capsys.readouterr().out
    trials = [json.loads(line) for line in (tmp_path / "kill_matrix.jsonl").read_text().splitlines()]
    assert [trial["differs"] for trial in trials] == [[]] * 6
    struck = [fault for trial in trials for fault, hit in zip(trial["faults"], trial["struck"], strict=False) if hit]
    assert len(struck) >= 6, "every trial kills something"
    assert {"step", "save", "manifest", "rename", "remove"} <= {fault["moment"] for fault in struck}
