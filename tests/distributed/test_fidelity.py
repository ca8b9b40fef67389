"""A file of torchtitan v0.2.2 trains here what it trained there: a sample of the benchmark, and what it would miss."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fidelity  # found by the line above
import made_data
import torchtitan_oracle

ORACLE = "TORCHTITAN_PYTHON"
SAMPLE = ("debug file", "accumulation", "cosine decay to a tenth", "weight decay 1", "every default, in float32")
STEPS = 10


@pytest.mark.slow
def test_the_same_file_trains_the_same(tmp_path):
    """Both trainers, for real: rates to the last digit, losses within 1e-5, gradient norms within 1e-4."""
    if ORACLE not in os.environ:
        pytest.skip(f"{ORACLE} does not name the Python of an environment with torchtitan 0.2.2")
    command = [sys.executable, str(ROOT / "benchmarks/fidelity.py"), "--oracle", os.environ[ORACLE]]
    command += ["--steps", str(STEPS), "--out", str(tmp_path), "--only", *SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads((tmp_path / "fidelity.json").read_text())["figures"]
    assert found["oracle"]["torchtitan"] == "0.2.2"
    assert set(found["compared"]) == set(SAMPLE[:1] + SAMPLE[2:]) | {"accumulation over 4 micro-batches"}
    for one in found["compared"].values():
        ours, theirs = one["losses"]
        assert len(ours) == len(theirs) == STEPS
        assert one["met"]


def one_side(steps: int) -> dict[str, list[dict[str, float]]]:
    """What a training of `steps` steps leaves. torchtitan's own norm is a little off, which is no difference."""
    records = [
        {"step": n, "loss": 8.0 - n / 10, "grad_norm": 1.0 + n, "exact_grad_norm": 1.0 + n, "lr": 1e-3 / n}
        for n in range(1, steps + 1)
    ]
    return {"step": records, "validation": [{"step": 1, "loss": 7.0}, {"step": 2, "loss": 6.0}]}


def test_two_equal_trainings_are_within_the_targets():
    theirs = one_side(3)
    theirs["step"][2]["grad_norm"] *= 1 + 2e-4
    found = fidelity.compare_trainings(one_side(3), theirs, fidelity.FLOAT32, 3)
    assert found["met"]
    assert found["printed_grad_norm"] == pytest.approx(2e-4, rel=1e-3)
    assert (found["loss"], found["grad_norm"], found["validation_loss"], found["unequal_rates"]) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("kind", "key", "factor"),
    [
        ("step", "loss", 1 + 3e-5),
        ("step", "grad_norm", 1 - 3e-4),
        ("step", "loss", math.nan),
        ("step", "lr", 1 + 2**-52),
        ("validation", "loss", 1.1),
    ],
)
def test_one_number_that_is_off_at_one_step_misses(kind, key, factor):
    ours = copy.deepcopy(one_side(3))
    ours[kind][1][key] *= factor
    assert not fidelity.compare_trainings(ours, one_side(3), fidelity.FLOAT32, 3)["met"]


def test_a_step_or_a_validation_that_is_missing_is_no_comparison():
    with pytest.raises(SystemExit, match="not every step is in torchtitan's records"):
        fidelity.compare_trainings(one_side(3), one_side(2), fidelity.FLOAT32, 3)
    ours = one_side(3)
    del ours["validation"][0]
    with pytest.raises(SystemExit, match="after the same steps"):
        fidelity.compare_trainings(ours, one_side(3), fidelity.FLOAT32, 3)


def drawn(deviation: float = 0.02, ones: float = 1.0) -> dict[str, list[tuple[float, float]]]:
    return {"wq": [(0.0, deviation), (0.0, deviation)], "norm": [(ones, 0.0), (ones, 0.0)]}


FIRST = {"loss": [8.1, 8.2], "grad_norm": [1.2, 1.6]}


@pytest.mark.parametrize(
    ("ours", "first", "met"),
    [
        (drawn(), FIRST, True),
        (drawn(0.0203), FIRST, True),
        (drawn(0.0206), FIRST, False),
        (drawn(ones=0.5), FIRST, False),
        (drawn(), {"loss": [8.1, 8.2], "grad_norm": [22.0, 35.0]}, False),
    ],
)
def test_initial_weights_of_another_distribution_miss(ours, first, met):
    found = fidelity.weights_result({"ours": ours, "theirs": drawn()}, {"ours": first, "theirs": FIRST})
    assert found["met"] is met


def test_the_held_out_documents_have_the_tokens_that_were_asked_for(tmp_path):
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    count = made_data.write_tokenizer(tmp_path / "tokenizer", text)
    assert sum(map(count, made_data.documents_with_tokens(1290, text, count))) == 1290
    with pytest.raises(SystemExit, match="does not have 4 documents"):
        made_data.documents_with_tokens(10**6, text, count)


def test_a_python_without_the_package_is_no_oracle(tmp_path):
    with pytest.raises(torchtitan_oracle.OracleMissing, match="does not have torchtitan"):
        torchtitan_oracle.find_oracle(Path(sys.executable))
    with pytest.raises(torchtitan_oracle.OracleMissing, match="cannot be run"):
        torchtitan_oracle.find_oracle(tmp_path / "python")


@pytest.mark.slow
def test_an_environment_that_pip_cannot_fill_is_reported(tmp_path, monkeypatch):
    """The command that failed, pip's own words, and what to do; a second try begins where the first ended."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for _ in range(2):
        with pytest.raises(torchtitan_oracle.OracleMissing) as failed:
            torchtitan_oracle.build_oracle(tmp_path)
        message = str(failed.value)
        assert "give --oracle PYTHON" in message
        assert "$ python -m pip install --disable-pip-version-check torch==2.13.0" in message
        assert "No matching distribution found" in message
