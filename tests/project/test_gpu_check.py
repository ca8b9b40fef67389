"""benchmarks/gpu_check.sh without a GPU: its lines are accepted, and its table judges what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, launch_environ

sys.path.append(str(ROOT / "benchmarks"))
import gpu_table  # found by the line above

CPU_LOSSES = json.loads(gpu_table.LOSSES.read_text(encoding="utf-8"))


def gpu_check(*arguments: str, out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *arguments]
    given = launch_environ({"OUT": str(out), "LIMIT_FACTOR": "8", "OMP_NUM_THREADS": "1", **environ})
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.mark.more
def test_each_line_is_accepted_without_a_gpu(tmp_path: Path) -> None:
    done = gpu_check("--dry", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 11
    assert all(step["code"] == 0 for step in steps)


@pytest.mark.more
def test_a_refused_line_gives_exit_code_1_and_the_others_are_checked(tmp_path: Path) -> None:
    done = gpu_check("--dry", out=tmp_path, LAYERS="0")
    assert done.returncode == 1
    codes = {
        step["step"]: step["code"] for step in map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    }
    assert {name for name, code in codes.items() if code} == set(gpu_table.WIDE)
    assert "n_layers" in done.stdout


@pytest.mark.more
@pytest.mark.parametrize(("device", "code"), [("h200-141gb", 0), ("h100-80gb", 1)])
def test_all_layers_of_8b_need_the_memory_of_an_h200(tmp_path: Path, device: str, code: int) -> None:
    done = gpu_check("--dry", "wide_bf16", "wide_mixed", out=tmp_path, LAYERS="32", ROWS="1", DEVICE=device)
    assert done.returncode == code, done.stdout


@pytest.mark.more
def test_the_recorded_losses_are_those_that_the_cpu_trains(tmp_path: Path) -> None:
    """The step `debug` as it runs on a GPU, here on the CPU. Processors and torch's kernels differ in the last bits."""
    done = gpu_check("--only", "debug", out=tmp_path, COMM_BACKEND="gloo")
    with tarfile.open(tmp_path / "all.tgz") as packed:
        packed.extractall(tmp_path / "all", filter="data")
    losses = gpu_table.Results.read(tmp_path / "all").losses("debug")
    assert losses == pytest.approx(CPU_LOSSES, rel=1e-5), done.stdout
    assert "debug run, losses against the CPU's" in (tmp_path / "table.txt").read_text()


def test_an_unknown_step_and_no_mode_are_refused(tmp_path: Path) -> None:
    unknown = gpu_check("--only", "prob", out=tmp_path)
    assert unknown.returncode == 2
    assert "no step is named prob; there are: probe debug" in unknown.stderr
    assert gpu_check(out=tmp_path).returncode == 2


def record(step: int, loss: float, attempt: int = 1, **more: Any) -> dict[str, Any]:
    figures = {
        "tokens_per_second_per_device": 9000.0,
        "mfu": 0.47,
        "memory_active_gib": 50.0,
        "memory_reserved_gib": 55.0,
    }
    return {"kind": "train", "step": step, "attempt": attempt, "loss": loss, **figures, **more}


def write_results(folder: Path, float8_rate: float = 11_000.0, second_loss: float = 2.0) -> Path:
    """The files of a check of a GPU on which everything is as wanted, unless an argument says otherwise."""
    runs = {name: [record(step, 8.0 - step) for step in range(1, 7)] for name in gpu_table.WIDE}
    for row in runs["wide_float8"]:
        row["tokens_per_second_per_device"] = float8_rate
    runs["debug"] = [record(step, loss * (1 + 5e-5)) for step, loss in enumerate(CPU_LOSSES, start=1)]
    runs["resume"] = [record(1, 3.0), record(2, 2.5), record(3, 2.0), record(3, second_loss, attempt=2)]
    for name, rows in runs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        estimate = {"memory": {"peak_active_gib": 51.0, "peak_reserved_gib": 58.0}}
        (folder / f"{name}.estimate.json").write_text(json.dumps(estimate))
    probe = {
        "attention_time": {"default": "CUDNN_ATTENTION", **{name: {"ms": 3.0} for name in gpu_table.KERNELS}},
        "attention_of_parts": {"bfloat16, 256 queries": [4e-3], "float32, 256 queries": [1e-5]},
        "race_of_found_inf": {"rounds": 200, "good_steps_skipped": 0, "bad_steps_taken": 0},
        "rates": {"failed": "RuntimeError: no"},
    }
    (folder / "probe.json").write_text(json.dumps(probe))
    (folder / "steps.jsonl").write_text('{"step": "debug", "code": 0, "seconds": 20}\n')
    return folder


def verdicts(folder: Path) -> dict[str, str]:
    return {each.name: each.row[3] for each in gpu_table.targets(gpu_table.Results.read(folder), CPU_LOSSES)}


def test_a_good_gpu_meets_the_targets(tmp_path: Path) -> None:
    found = verdicts(write_results(tmp_path))
    assert "MISSED" not in found.values()
    assert found["debug run, losses against the CPU's"] == "met"
    assert found["wide_bf16, speed"] == found["float8 against bfloat16, compiled"] == "met"
    assert found["wide_mixed, reserved memory"] == found["resume, losses of repeated steps"] == "met"
    assert found["CPU offload, updates skipped or made wrongly"] == "met"
    assert found["step nvshmem"] == found["probe rates"] == "not run"


@pytest.mark.parametrize(
    ("file", "old", "new", "missed"),
    [
        ("wide_float8.jsonl", "11000", "10000", "float8 against bfloat16, compiled"),
        ("wide_bf16.jsonl", "0.47", "0.44", "wide_bf16, speed"),
        ("wide_bf16.jsonl", "50.0", "53.0", "wide_bf16, active memory"),
        ("wide_mixed.jsonl", "55.0", "53.0", "wide_mixed, reserved memory"),
        (
            "resume.jsonl",
            '"attempt": 2, "loss": 2.0',
            '"attempt": 2, "loss": 2.0000001',
            "resume, losses of repeated steps",
        ),
        ("debug.jsonl", '"loss": 4.1', '"loss": 4.2', "debug run, losses against the CPU's"),
        ("steps.jsonl", '"code": 0', '"code": 124', "step debug"),
        (
            "probe.json",
            '"good_steps_skipped": 0',
            '"good_steps_skipped": 3',
            "CPU offload, updates skipped or made wrongly",
        ),
        ("probe.json", '"default": "CUDNN_ATTENTION"', '"default": "MATH"', "attention kernel of bfloat16"),
        ("probe.json", "0.004", "0.04", "context parallelism, attention in bfloat16"),
    ],
)
def test_a_figure_that_misses_is_shown(tmp_path: Path, file: str, old: str, new: str, missed: str) -> None:
    path = write_results(tmp_path) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert [name for name, verdict in verdicts(tmp_path).items() if verdict == "MISSED"] == [missed]


def test_the_script_names_the_table_of_no_results(tmp_path: Path) -> None:
    assert set(verdicts(tmp_path).values()) == {"not run"}
