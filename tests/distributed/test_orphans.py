"""No orphans: whoever is killed with SIGKILL, in seconds nothing of the run is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, TORCHRUN, TRAIN, Running, is_alive, launch, replace_loop, wait_until

ENDLESS = """
import os, pathlib, time

def run(run, environ):
    pathlib.Path(environ["REPORTS"], "rank" + environ["RANK"]).write_text(f"{os.getpid()} {os.getppid()}")
    while True:
        time.sleep(60)
"""


def start(command: list[str], folder: Path, loop_environ: dict[str, str]) -> tuple[Running, list[int], int]:
    """A run of two ranks that goes on for ever: the run, the process ids of its ranks, that of its torchrun."""
    environ = {**loop_environ, "NGPU": "2", "REPORTS": str(folder)}
    running = Running([*command, "--job.dump_folder", str(folder / "run")], environ)
    reports = [folder / "rank0", folder / "rank1"]
    try:
        assert wait_until(lambda: all(report.exists() and report.read_text() for report in reports), 150)
    except BaseException:
        running.kill_all()
        raise
    running.process_tree()
    pairs = [report.read_text().split() for report in reports]
    return running, [int(rank) for rank, _ in pairs], int(pairs[0][1])


@pytest.mark.parametrize("victim", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_nothing_outlives_a_kill(victim: str, tmp_path: Path) -> None:
    running, ranks, torchrun = start(RUN_TRAIN, tmp_path, replace_loop(tmp_path / "stand_in", ENDLESS))
    try:
        assert {*ranks, torchrun, running.process.pid} <= running.process_tree()
        if victim == "launcher":
            running.process.kill()
        else:
            os.kill(torchrun, signal.SIGKILL)
        ended = running.end(40)
        assert ended.code not in (0, 2)
        assert wait_until(lambda: not any(is_alive(pid) for pid in (*ranks, torchrun)), 30)
    finally:
        running.kill_all()


def test_ranks_of_a_bare_torchrun_die_with_it_and_free_their_folder(tmp_path: Path) -> None:
    command = [
        *TORCHRUN,
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
        str(ROOT / "torchtitan/train.py"),
    ]
    loop_environ = replace_loop(tmp_path / "stand_in", ENDLESS)
    running, ranks, torchrun = start(command, tmp_path, loop_environ)
    try:
        assert torchrun == running.process.pid
        second = launch(
            [*TRAIN, "--job.dump_folder", str(tmp_path / "run")], {**loop_environ, "REPORTS": str(tmp_path)}
        )
        assert second.code == 2
        assert f"this run folder is in use by process {ranks[0]} on " in second.err
        assert second.err.count("job.dump_folder") == 2  # the key and the way out, in one report
        running.process.kill()
        assert wait_until(lambda: not any(is_alive(pid) for pid in ranks), 30)
    finally:
        running.kill_all()


TINY = ["--model.n_layers=1", "--model.dim=32", "--model.n_heads=2", "--model.n_kv_heads=2", "--model.ffn_dim=64"]
TINY += ["--training.seq_len=64", "--profiling.no_enable_profiling", "--metrics.log_freq=1"]


def steps_of(metrics: Path) -> list[tuple[int, int]]:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(record["attempt"], record["step"]) for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_a_killed_training_can_be_started_again_at_once(tmp_path: Path) -> None:
    """The real trainer: SIGKILL the launcher in mid-run, and start the next run in the same folder without waiting."""
    command = [*RUN_TRAIN, *TINY, "--job.dump_folder", str(tmp_path)]
    running = Running([*command, "--training.steps", "100000"], {"NGPU": "2"})
    try:
        assert wait_until(lambda: len(steps_of(tmp_path / "metrics.jsonl")) >= 3, 120)
        running.process.kill()
        again = launch([*command, "--training.steps", "2"], {"NGPU": "2"}, timeout=120)
    finally:
        running.kill_all()
    assert again.code == 0, again.err
    assert steps_of(tmp_path / "metrics.jsonl")[-2:] == [(2, 1), (2, 2)]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_training_and_is_named(tmp_path: Path) -> None:
    """The real trainer: the survivors fail with gloo's errors, and what is shown last is the kill."""
    running = Running(
        [*RUN_TRAIN, *TINY, "--job.dump_folder", str(tmp_path), "--training.steps", "100000"], {"NGPU": "2"}
    )
    try:
        assert wait_until(lambda: len(steps_of(tmp_path / "metrics.jsonl")) >= 3, 120)
        held_by = int((tmp_path / ".lock").read_text().split()[1])  # rank 0
        os.kill(held_by, signal.SIGKILL)
        ended = running.end(60)
    finally:
        running.kill_all()
    assert ended.code == 1
    assert f"rank 0 (process {held_by}) was killed by SIGKILL" in ended.err.rstrip().splitlines()[-2]
