"""A run of torchtitan v0.2.2 goes on here and one of ours there, with the package; and what the proof would miss."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
from launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import continue_torchtitan as proof  # found by the line above

ORACLE = "TORCHTITAN_PYTHON"


@pytest.mark.slow
def test_nobody_sees_that_the_trainer_has_changed(tmp_path):
    """Rates to the last digit, losses within 1e-5, norms within 1e-4: one rank, FSDP 2, TP 2, and the way back."""
    if ORACLE not in os.environ:
        pytest.skip(f"{ORACLE} does not name the Python of an environment with torchtitan 0.2.2")
    command = [sys.executable, str(ROOT / "benchmarks/continue_torchtitan.py"), "--oracle", os.environ[ORACLE]]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads((tmp_path / "continue_torchtitan.json").read_text())["figures"]
    assert found["oracle"]["torchtitan"] == "0.2.2"
    assert set(found["runs"]) == {*proof.LAYOUTS, proof.ROUND_TRIP, proof.TO_TORCHTITAN}
    for one in found["runs"].values():
        assert one["met"]
        assert set(one["tensors"]) == {"weight", "exp_avg", "exp_avg_sq", "step"}
        assert one["tensors"]["step"] == 0


WHOLE = {n: {"loss": 8.0 - n / 10, "grad_norm": 1.0 + n, "lr": 1e-3 / n} for n in range(1, 7)}
SECOND = {n: WHOLE[n] for n in (4, 5, 6)}


def test_the_second_half_of_the_same_run_is_within_the_targets():
    found = proof.compare_steps(WHOLE, copy.deepcopy(SECOND), 4, 6)
    assert found["met"]
    assert (found["loss"], found["grad_norm"], found["unequal_rates"]) == (0, 0, [])


@pytest.mark.parametrize(("key", "factor"), [("loss", 1 + 3e-5), ("grad_norm", 1 - 3e-4), ("lr", 1 + 2**-52)])
def test_one_number_that_is_off_at_one_step_misses(key, factor):
    resumed = copy.deepcopy(SECOND)
    resumed[5][key] *= factor
    assert not proof.compare_steps(WHOLE, resumed, 4, 6)["met"]


def test_a_run_that_began_anew_is_no_comparison():
    with pytest.raises(SystemExit, match="steps 4 to 6 are expected"):
        proof.compare_steps(WHOLE, WHOLE, 4, 6)
