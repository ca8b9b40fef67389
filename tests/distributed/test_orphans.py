"""No orphans: whoever is killed with SIGKILL, in seconds nothing of the run is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, TORCHRUN, TRAIN, Running, is_alive, launch, stand_in, wait_until

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
        assert wait_until(lambda: all(report.exists() and report.read_text() for report in reports), 60)
    except BaseException:
        running.kill_all()
        raise
    running.family()
    pairs = [report.read_text().split() for report in reports]
    return running, [int(rank) for rank, _ in pairs], int(pairs[0][1])


@pytest.mark.parametrize("victim", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_nothing_outlives_a_kill(victim: str, tmp_path: Path) -> None:
    running, ranks, torchrun = start(RUN_TRAIN, tmp_path, stand_in(tmp_path / "stand_in", ENDLESS))
    try:
        assert {*ranks, torchrun, running.process.pid} <= running.family()
        if victim == "launcher":
            running.process.kill()
        else:
            os.kill(torchrun, signal.SIGKILL)
        ended = running.end(10)
        assert ended.code not in (0, 2)
        assert wait_until(lambda: not any(is_alive(pid) for pid in (*ranks, torchrun)), 5)
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
    loop_environ = stand_in(tmp_path / "stand_in", ENDLESS)
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
        assert wait_until(lambda: not any(is_alive(pid) for pid in ranks), 5)
    finally:
        running.kill_all()
