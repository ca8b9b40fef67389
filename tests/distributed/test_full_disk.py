"""A disk that is full or read-only: a small file system of its own, mounted where nobody else sees it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from launching import ROOT, launch, launch_environ
from training import DEBUG_FILE, TINY

from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics


def may_mount() -> bool:
    """Whether the kernel lets this user make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="needs a mount namespace (unshare -rm)")


def train_on(options: str, folder, *arguments: str):
    """Train on one rank with the checkpoint folder on a tmpfs of those mount options; afterwards it is listed."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    command = [
        sys.executable,
        "-m",
        "quadriga.train",
        "--job.config_file",
        DEBUG_FILE,
        "--job.dump_folder",
        str(folder),
    ]
    command += [*TINY, "--training.steps=6", "--checkpoint.enable", "--checkpoint.interval=2", *arguments]
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && {{ "$@"; code=$?; ls -A "$0"; exit $code; }}'
    return launch(["unshare", "-rm", "sh", "-c", script, str(checkpoint), *command], launch_environ(), ROOT)


def test_on_a_full_disk_training_goes_on_and_the_older_checkpoint_is_whole(tmp_path):
    ended = train_on("size=900k", tmp_path)
    assert ended.code == 1, "the last save failed too, and that is no good end"
    for step in (4, 6):
        assert f"step {step} was not saved" in ended.err
    assert "No space left on device" in ended.err
    assert f"whole in {tmp_path}/checkpoint: step-2\n" in ended.err
    assert "room left there" in ended.err
    assert "training goes on" in ended.err
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
    assert "training goes on" not in ended.err
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_read_only_folder_is_told_before_the_first_step(tmp_path):
    """To learn after hours that nothing can be saved is too late."""
    ended = train_on("ro", tmp_path)
    assert ended.code == 2
    assert "checkpoint.folder" in ended.err
    assert "Read-only file system" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "metrics.jsonl").exists()
