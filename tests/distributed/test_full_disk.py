"""A disk that is full or read-only: a small file system of its own, mounted where nobody else sees it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from launching import ROOT, launch, launch_environ
from training import DEBUG_FILE, TINY

from quadriga.checkpoint import folder as folders
from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics


def may_mount() -> bool:
    """Whether the kernel lets this user make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="needs a mount namespace (unshare -rm)")


def train_on(options: str, folder, *arguments: str, mounted: str = "checkpoint"):
    """Train on one rank with a folder of the run, or itself (`.`), on a tmpfs of those mount options; afterwards it is
    listed."""
    checkpoint = folder / mounted
    checkpoint.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "quadriga.train",
        "--job.config_file",
        DEBUG_FILE,
        "--job.dump_folder",
        str(folder),
    ]
    command += [
        *(argument for argument in TINY if argument.replace("no_enable", "enable") not in arguments),
        "--training.steps=6",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        *arguments,
    ]
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && {{ "$@"; code=$?; ls -A "$0"; exit $code; }}'
    environ = launch_environ({"OMP_NUM_THREADS": "1"})
    return launch(["unshare", "-rm", "sh", "-c", script, str(checkpoint), *command], environ, ROOT)


def test_on_a_full_disk_training_goes_on_and_the_older_checkpoint_is_whole(tmp_path):
    ended = train_on("size=900k", tmp_path)
    assert ended.code == 1, "the last save failed too, and that is no good end"
    for step in (4, 6):
        assert f"step {step} was not saved" in ended.err
    assert "No space left on device" in ended.err
    assert f"complete in {tmp_path}/checkpoint: step-2\n" in ended.err
    assert "free space there" in ended.err
    assert "training continues" in ended.err
    assert "Traceback" not in ended.err
    assert ended.out.split()[-1] == "step-2", "the room of the failed saves was given back"
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    events = [(event["event"], event["step"]) for event in read_events(tmp_path) if event["event"].startswith("save_")]
    assert events == [
        *(("save_begin", 2), ("save_end", 2), ("save_begin", 4), ("save_failed", 4), ("save_begin", 6)),
        ("save_failed", 6),
    ]


@pytest.mark.slow
def test_on_a_full_disk_training_stops_where_that_is_wanted(tmp_path):
    ended = train_on("size=900k", tmp_path, "--checkpoint.on_save_failure=stop")
    assert ended.code == 1
    assert "step 4 was not saved" in ended.err
    assert "training continues" not in ended.err
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_read_only_folder_is_reported_before_the_first_step(tmp_path):
    """To learn after hours that nothing can be saved is too late."""
    ended = train_on("ro", tmp_path)
    assert ended.code == 2
    assert "checkpoint.folder" in ended.err
    assert "Read-only file system" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "metrics.jsonl").exists()


def all_files(folder) -> tuple[str, ...]:
    """Everything that a run can write, its checkpoints elsewhere."""
    return (
        *("--metrics.enable_tensorboard", "--metrics.log_documents", "--profiling.enable_profiling"),
        *("--profiling.profile_freq=2", "--profiling.profiler_active=1", "--profiling.profiler_warmup=0"),
        f"--checkpoint.folder=file://{folder}/elsewhere",
    )


def test_a_full_run_folder_ends_nothing(tmp_path):
    """No room for records, metrics, curves, documents, events or traces: each is told once, and training continues."""
    (tmp_path / "run").mkdir()
    ended = train_on("size=16k", tmp_path / "run", *all_files(tmp_path), mounted=".")
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    warned = [line for line in ended.err.splitlines() if "cannot be written" in line]
    for file in ("metrics.jsonl", "/tb", "documents/rank0.jsonl", "profile_trace", "estimate.json"):
        (line,) = (line for line in warned if f"{file} cannot be written" in line)
        assert "No space left" in line or "no space left" in line
        assert line.endswith("the run continues")
    assert folders.find_complete(tmp_path / "elsewhere").step == 6
    assert "finished: 6 steps" in ended.out


def test_a_full_run_folder_stops_the_run_where_that_is_wanted(tmp_path):
    (tmp_path / "run").mkdir()
    arguments = (*all_files(tmp_path), "--metrics.on_write_failure=stop", "--checkpoint.interval=100")
    ended = train_on("size=16k", tmp_path / "run", *arguments, mounted=".")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    found = folders.find_complete(tmp_path / "elsewhere")
    assert 1 <= found.step < 6
    *_, what, where, todo = ended.err.strip().splitlines()
    assert "cannot be written" in what
    assert 'metrics.on_write_failure is "stop"' in what
    assert where == f"stopped after step {found.step}, which is saved in file://{found.path}"
    assert todo.startswith("to do: ")


@pytest.mark.slow
@pytest.mark.parametrize("mounted", ["tb", "profile_trace"])
def test_one_full_folder_takes_nothing_from_the_others(tmp_path, mounted):
    ended = train_on("size=4k", tmp_path, *all_files(tmp_path / "saves"), mounted=mounted)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert f"/{mounted}" in next(line for line in ended.err.splitlines() if "cannot be written" in line)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
