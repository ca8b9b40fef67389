"""Whose error is shown last and which code is returned, from the notes that ranks and agent left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from estimating import run_of

from quadriga.errors import UserError
from quadriga.launch.agent import FAILURES_FILE
from quadriga.launch.environment import LOOPBACK_RENDEZVOUS, LaunchRequest
from quadriga.launch.exit_status import report_exit
from quadriga.launch.supervisor import heap_variables, launch_arguments, torchrun_arguments
from quadriga.resilience.processes import ExitRecord

LOST = "RuntimeError: Connection closed by peer"


def start(folder: Path, number: int = 0) -> Path:
    """Where the ranks leave their records at the first start, or after so many restarts."""
    own = folder / str(number)
    own.mkdir(exist_ok=True)
    return own


def write_failures_file(folder: Path, **ends: tuple[int, int]) -> None:
    """The agent's note: rank1=(exit code, time)."""
    known = {rank.removeprefix("rank"): (code, time) for rank, (code, time) in ends.items()}
    text = {rank: {"pid": 100 + int(rank), "exitcode": code, "time": time} for rank, (code, time) in known.items()}
    (folder / FAILURES_FILE).write_text(json.dumps(text))


def failure(rank: int, time: float, error: str, lost_peer: bool = False, **more: object) -> ExitRecord:
    return ExitRecord(rank, 1, time, error, f"Traceback of rank {rank}\n{error}", lost_peer=lost_peer, **more)  # type: ignore[arg-type]


def last_message(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.messages[-1].rstrip().splitlines()[-1]


def test_the_earliest_error_is_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(0, 11.0, "KeyError: 'second'").write(start(tmp_path))
    failure(3, 10.5, "ValueError: first").write(start(tmp_path))
    write_failures_file(tmp_path, rank0=(1, 11), rank3=(1, 11), rank1=(-signal.SIGTERM, 11))
    assert report_exit(tmp_path, 4, 1, []) == 1
    assert last_message(caplog) == "ValueError: first"


def test_a_lost_peer_is_a_consequence_even_when_noted_earlier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(0, 10.0, LOST, lost_peer=True).write(start(tmp_path))
    failure(1, 10.4, "ValueError: the cause, noted after its process group was closed").write(start(tmp_path))
    assert report_exit(tmp_path, 2, 1, []) == 1
    assert "the cause" in last_message(caplog)


def test_a_killed_rank_comes_before_those_that_miss_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(0, 10.2, LOST, lost_peer=True).write(start(tmp_path))
    write_failures_file(tmp_path, rank0=(1, 10), rank2=(-signal.SIGKILL, 10), rank1=(-signal.SIGTERM, 10))
    assert report_exit(tmp_path, 3, 1, []) == 1
    assert "rank 2 (process 102) was killed by SIGKILL" in caplog.messages[-1]


def test_survivors_that_torchrun_had_to_kill_are_not_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failure(1, 10.9, "ValueError: first").write(start(tmp_path))
    write_failures_file(tmp_path, rank1=(1, 11), rank0=(-signal.SIGKILL, 41))
    assert report_exit(tmp_path, 2, 1, []) == 1
    assert last_message(caplog) == "ValueError: first"


def test_a_users_mistake_on_one_rank_is_exit_2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ExitRecord(1, 2, 10.0, "data.jsonl", "quadriga: 1 problem\n\ndata.jsonl, line 3", is_report=True).write(
        start(tmp_path)
    )
    assert report_exit(tmp_path, 2, 1, []) == 2
    assert caplog.messages == ["quadriga: 1 problem\n\ndata.jsonl, line 3"]


def test_without_any_exit_record_the_report_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert report_exit(tmp_path, 2, 1, []) == 1
    assert "before any rank reported an error" in last_message(caplog)


def test_ranks_that_saved_on_a_signal_end_well(tmp_path: Path) -> None:
    for rank in range(2):
        ExitRecord(rank, 0, 10.0).write(start(tmp_path))
    assert report_exit(tmp_path, 2, 128 + signal.SIGTERM, [signal.SIGTERM]) == 0
    assert report_exit(tmp_path, 3, 128 + signal.SIGTERM, [signal.SIGTERM]) == 143  # one rank did not


def test_ranks_that_were_asked_to_leave_give_the_code_of_the_run(tmp_path: Path) -> None:
    """Whether torchrun saw them leave with 0, was signalled itself, or killed those that were slower."""
    for rank in range(2):
        ExitRecord(rank, 75, 10.0, asked=True).write(start(tmp_path))
    assert report_exit(tmp_path, 2, 0, []) == 75
    assert report_exit(tmp_path, 2, 0, [signal.SIGUSR1]) == 75
    write_failures_file(tmp_path, rank2=(-signal.SIGTERM, 11))
    assert report_exit(tmp_path, 3, 128 + signal.SIGTERM, [signal.SIGTERM]) == 75


def test_what_an_earlier_start_left_decides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(1, 10.0, "ValueError: of the first start").write(start(tmp_path, 0))
    for rank in range(2):
        ExitRecord(rank, 0, 20.0).write(start(tmp_path, 10))
    failure(0, 15.0, "ValueError: of the ninth").write(start(tmp_path, 9))
    assert report_exit(tmp_path, 2, 0, []) == 0
    failure(1, 30.0, "ValueError: of the last start").write(start(tmp_path, 11))
    assert report_exit(tmp_path, 2, 1, []) == 1
    assert last_message(caplog) == "ValueError: of the last start"


def test_a_hang_is_reported_and_not_the_kill_that_ended_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The record carries the time at which the rank stopped; the watchdog killed it later."""
    ExitRecord(0, 4, 10.0, "stalled", "stalled\n\nrank 1 stopped", is_report=True).write(start(tmp_path))
    write_failures_file(tmp_path, rank1=(-signal.SIGKILL, 18), rank0=(4, 18))
    assert report_exit(tmp_path, 2, 1, []) == 4
    assert last_message(caplog) == "rank 1 stopped"


def test_an_interrupted_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ExitRecord(0, 130, 10.0).write(start(tmp_path))
    failure(1, 10.0, LOST, lost_peer=True).write(start(tmp_path))
    assert report_exit(tmp_path, 2, 130, [signal.SIGINT]) == 130
    assert last_message(caplog) == "stopped by SIGINT"


def test_a_fault_while_stopping_is_still_a_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure(0, 10.0, "OSError: No space left on device").write(start(tmp_path))
    assert report_exit(tmp_path, 2, 143, [signal.SIGTERM]) == 1
    assert last_message(caplog) == "OSError: No space left on device"


def test_one_machine_meets_on_itself_and_several_at_the_endpoint() -> None:
    here = torchrun_arguments(LaunchRequest(ranks=4, restarts=3))
    assert here[here.index("--rdzv-backend") + 1] == LOOPBACK_RENDEZVOUS
    assert here[-2:] == ["-m", "quadriga.train"]
    assert here[here.index("--max-restarts") + 1] == "3"
    there = torchrun_arguments(LaunchRequest(ranks=8, nodes=2, node=1, endpoint="node0:29500"))
    assert there[there.index("--rdzv-backend") + 1] == "static"
    assert "node0:29500" in there
    assert there[there.index("--node-rank") + 1] == "1"


def test_a_file_on_the_command_line_comes_after_config_file() -> None:
    argv = ["--job.config_file", "mine.toml"]
    assert launch_arguments(argv, {"CONFIG_FILE": "other.toml"}) == ["--job.config_file", "other.toml", *argv]
    assert launch_arguments(argv, {}) == argv


def test_the_heap_of_nvshmem_is_set_for_the_ranks_or_refused() -> None:
    run = run_of("--comm.backend=nvshmem", ranks=2)
    given = heap_variables(run, {})
    assert list(given) == ["NVSHMEM_SYMMETRIC_SIZE"]
    assert heap_variables(run, given) == given
    assert heap_variables(run, {"NVSHMEM_SYMMETRIC_SIZE": "2G"}) == {"NVSHMEM_SYMMETRIC_SIZE": "2G"}
    assert heap_variables(run_of("--comm.backend=nccl", ranks=2), {"NVSHMEM_SYMMETRIC_SIZE": "1"}) == {}
    with pytest.raises(UserError, match=f"={given['NVSHMEM_SYMMETRIC_SIZE']}"):
        heap_variables(run, {"NVSHMEM_SYMMETRIC_SIZE": str(int(given["NVSHMEM_SYMMETRIC_SIZE"]) - 1)})
