"""A run that stands still ends in time and names the rank it waited for; one that is merely slow goes on."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest
from launching import RUN_TRAIN, Running, finished_steps, is_alive, wait_until
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, one_rank

from quadriga.metrics.events import read_events
from quadriga.resilience.processes import RECORDS, read_records

TIMEOUT = 15
STALLING = (*TINY, f"--comm.train_timeout_seconds={TIMEOUT}", "--comm.trace_buf_size=500")


def test_a_stopped_rank_is_named_with_its_stack_and_nothing_is_left(tmp_path: Path) -> None:
    endless = ("--training.steps=100000",)
    running = Running(
        [*RUN_TRAIN, *STALLING, "--training.global_batch_size=9", *endless, "--job.dump_folder", str(tmp_path)],
        {"NGPU": "3"},
    )
    try:
        assert wait_until(lambda: finished_steps(tmp_path) >= 4, 90)
        victim = process_of_rank(running, 2)
        os.kill(victim, signal.SIGSTOP)
        start = time.monotonic()
        ended = running.end(60)
        assert time.monotonic() - start < TIMEOUT
        assert ended.code == 4, ended.err
        assert wait_until(lambda: not any(is_alive(pid) for pid in running.seen), 5)
        assert not [pid for pid in running.seen if Path(f"/proc/{pid}").exists()], "a zombie is left"
    finally:
        running.kill_all()
    report = ended.err[ended.err.rindex("the run has made no progress") :]
    assert "it waits for rank 2" in report
    assert f"process {victim} on " in report
    assert "sends no heartbeat: stopped" in report
    assert "loop.py" in report.partition("The stack of rank 2")[2]
    steps = finished_steps(tmp_path)
    match = re.search(r"at        step (\d+), phase '", report)
    assert match is not None
    assert 0 < int(match.group(1)) <= steps + 1
    assert re.search(rf"2 of 3 ranks; rank [01] \(step ({steps}|{steps + 1}), .*gloo:", report)
    for rank in range(3):
        assert "loop.py" in (tmp_path / f"comm_traces/stack_{rank}.txt").read_text()
    for rank in range(2):
        recorded = pickle.loads((tmp_path / f"comm_traces/rank_{rank}").read_bytes())
        assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")
    faults = [event for event in read_events(tmp_path) if event["event"] == "fault" and not event.get("lost_peer")]
    assert len(faults) == 1
    assert "it waits for rank 2" in faults[0]["error"]


def process_of_rank(running: Running, rank: int) -> int:
    """Torchrun gives every rank its number in the environment."""
    for pid in running.process_tree():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(f"no process is rank {rank}")


def lingers(folder: str, arguments: tuple[str, ...], who: int, step: int, seconds: float) -> int:
    """A run in which rank `who` (all, if negative) takes so long to have the batch of `step`."""
    from quadriga.data.loader import Loader

    take, taken = Loader.next, []

    def slow_next(self):
        taken.append(1)
        if len(taken) == step and who in (-1, int(os.environ["RANK"])):
            time.sleep(seconds)
        return take(self)

    Loader.next = slow_next
    return one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *arguments])


LAYOUTS = {
    "FSDP": (),
    "PP": ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"),
}


@pytest.mark.parametrize("layout", ["FSDP", pytest.param("PP", marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come_is_named_with_where_it_is(layout: str, tmp_path: Path) -> None:
    """It is alive: it waits for its data, the other one in a collective, or for a message of the pipeline."""
    records = tmp_path / "records"
    records.mkdir()
    arguments = (*STALLING, "--comm.train_timeout_seconds=12", *LAYOUTS[layout], "--training.steps=100")
    with pytest.raises(RankError, match="died with exit code 4"):
        run_ranks(
            *(lingers, 2, str(tmp_path / "run"), arguments, 1, 3, 600.0),
            backend=None,
            environ={RECORDS: str(records)},
        )
    assert wait_until(lambda: bool(read_records(records / "0")), 30)
    exits = read_records(records / "0")
    assert {record.code for record in exits} == {4}
    assert len({record.details for record in exits}) == 1
    report = exits[0].details
    assert "it waits for rank 1" in report
    assert "at        step 3, phase 'data'" in report
    assert "alive, and does not wait for others" in report
    assert "in slow_next" in report
    assert ("a message of the pipeline" if layout == "PP" else "gloo:") in report.partition("1 of 2 ranks; rank 0 ")[2]


def reads_alarms_late(folder: str, arguments: tuple[str, ...], seconds: float) -> int:
    """Rank 1 stays away from step 3, and the watchdog of rank 2 sees the alarm some time after the others."""
    from quadriga.resilience.watchdog import Watchdog

    read_alarm = Watchdog._read_alarm

    def read_late(self, store, text):
        report = read_alarm(self, store, text)
        if report is not None and self._rank == 2:
            time.sleep(seconds)
        return report

    Watchdog._read_alarm = read_late
    return lingers(folder, arguments, 1, 3, 60.0)


@pytest.mark.more
def test_no_rank_exits_before_all_have_written_their_stacks(tmp_path: Path) -> None:
    """Otherwise the exit of the first would end the others by the loss of a peer, before they see the alarm."""
    arguments = (*STALLING, "--training.global_batch_size=9", "--training.steps=100")
    with pytest.raises(RankError, match="died with exit code 4"):
        run_ranks(*(reads_alarms_late, 3, str(tmp_path), arguments, 1.0), backend=None, timeout=90)
    for rank in range(3):
        assert "loop.py" in (tmp_path / f"comm_traces/stack_{rank}.txt").read_text()
        assert (tmp_path / f"comm_traces/rank_{rank}").stat().st_size > 0


@pytest.mark.slow
def test_slow_steps_that_nobody_waits_for_and_slow_disks_go_on(tmp_path: Path) -> None:
    """All ranks take longer over a batch than a collective may; then rank 0 takes as long to publish a save."""
    arguments = (*STALLING, "--comm.train_timeout_seconds=5", "--checkpoint.enable", "--training.steps=4")
    codes = run_ranks(slow_everywhere, 2, str(tmp_path), arguments, backend=None, timeout=90)
    assert codes == [0, 0]
    assert (tmp_path / "checkpoint" / "step-4").is_dir()
    assert not list((tmp_path / "comm_traces").glob("stack_*"))


def slow_everywhere(folder: str, arguments: tuple[str, ...]) -> int:
    from quadriga.checkpoint import folder as folders

    publish = folders.publish

    def slow_publish(*given, **named):
        time.sleep(6)
        return publish(*given, **named)

    folders.publish = slow_publish
    return lingers(folder, arguments, -1, 3, 6.0)


def stops_in_a_save(folder: str, arguments: tuple[str, ...]) -> int:
    """Rank 0 is stopped while it publishes; the other one waits for it in a host group, which has patience."""
    from quadriga.checkpoint import folder as folders

    publish = folders.publish

    def stopped_publish(*given, **named):
        os.kill(os.getpid(), signal.SIGSTOP)
        return publish(*given, **named)

    folders.publish = stopped_publish
    return one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *arguments])


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_a_save_is_found_as_soon(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    arguments = (*STALLING, "--comm.train_timeout_seconds=8", "--checkpoint.enable", "--checkpoint.interval=2")
    with pytest.raises(RankError, match="died with exit code"):
        run_ranks(
            *(stops_in_a_save, 2, str(tmp_path / "run"), (*arguments, "--training.steps=9")),
            backend=None,
            timeout=120,
            environ={RECORDS: str(records)},
        )
    assert wait_until(lambda: bool(read_records(records / "0")), 30)
    last = read_records(records / "0")[-1]
    assert last.code == 4
    assert "it waits for rank 0" in last.details
    assert "step 2, phase 'save'" in last.details
    assert "(host), its operation" in last.details
    assert "in stopped_publish" in last.details
