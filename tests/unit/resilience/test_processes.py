"""The lock of a run folder, the death of an orphan, and the records that ranks leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import ROOT, is_alive, wait_until

from quadriga.errors import Fault, Problem, UserError
from quadriga.resilience import exit_reports, processes
from quadriga.resilience.processes import (
    AGENT_PID,
    RECORDS,
    RESTART_COUNT,
    ExitRecord,
    handle_signals,
    lock_run_folder,
    ranks_with_handlers,
    read_records,
)

HOLD = "import sys, time; from quadriga.resilience.processes import lock_run_folder\n"
HOLD += "with lock_run_folder(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@contextmanager
def holder_of(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_SECONDS", 0.2)
    with holder_of(tmp_path / "run") as holder:
        with pytest.raises(UserError) as refusal, lock_run_folder(str(tmp_path / "run")):
            pass
        assert f"in use by process {holder.pid} on " in refusal.value.report


def test_a_holder_is_named_on_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 7\non here\n")
    with (tmp_path / ".lock").open() as file:
        assert "in use by process 7 on here" in processes.in_use(file.fileno(), str(tmp_path)).what


def test_a_full_disk_does_not_prevent_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with lock_run_folder(str(tmp_path)):
        assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.parametrize("make", [os.mkfifo, lambda lock: os.symlink("/dev/full", lock), os.mkdir])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"job\.dump_folder"), lock_run_folder(str(tmp_path)):
        pass


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    with holder_of(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        with lock_run_folder(str(tmp_path)):  # waits for the holder to die
            assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_the_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_run_folder(str(tmp_path)):
            pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), lock_run_folder(str(tmp_path / "file" / "run")):
        pass


PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
CHILD = """
import os, time
from quadriga.resilience.processes import die_with_parent
from quadriga.resilience.processes import die_with_torchrun
{guard}
print(os.getpid(), flush=True)
time.sleep(60)
"""


def orphan(guard: str) -> int:
    """The process id of a child that ran `guard` and then lost its parent to SIGKILL."""
    environ = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    command = [sys.executable, "-c", PARENT, CHILD.format(guard=guard)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
    return child


def test_an_orphan_is_killed_with_its_parent() -> None:
    child = orphan("die_with_parent()")
    assert wait_until(lambda: not is_alive(child), 30)


def test_a_run_started_by_hand_outlives_its_shell() -> None:
    child = orphan("die_with_torchrun(os.environ)")
    assert not wait_until(lambda: not is_alive(child), 0.5)
    os.kill(child, signal.SIGKILL)


def test_a_rank_whose_agent_is_gone_already_leaves_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environ = {**os.environ, AGENT_PID: str(gone.pid), "TORCHELASTIC_RUN_ID": "x"}
    code = CHILD.format(guard="die_with_torchrun(os.environ)")
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")


def test_records_come_back_in_order_of_time(tmp_path: Path) -> None:
    late = ExitRecord(0, 1, 20.0, "RuntimeError: Connection closed by peer", "...", lost_peer=True)
    early = ExitRecord(3, 2, 10.0, "data.jsonl, line 3", "the report", is_report=True)
    late.write(tmp_path)
    early.write(tmp_path)
    assert read_records(tmp_path) == [early, late]


def test_failures_are_recorded_for_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {RECORDS: str(tmp_path), "RANK": "2", "WORLD_SIZE": "4"}
    error = UserError(Problem("data.jsonl, line 3", "is not JSON"))
    assert exit_reports.report_failure(environ, error) == 2
    assert (
        exit_reports.report_failure({**environ, "RANK": "1"}, RuntimeError("gloo: Connection closed by peer [::1]"))
        == 1
    )
    assert processes.record_exit({**environ, "RANK": "0"}, 0) == 0
    by_rank = {record.rank: record for record in read_records(tmp_path / "0")}
    assert (by_rank[2].code, by_rank[2].details, by_rank[2].is_report) == (2, error.report, True)
    assert (by_rank[1].code, by_rank[1].lost_peer) == (1, True)
    assert "RuntimeError: gloo: Connection closed by peer" in by_rank[1].details
    assert by_rank[0].code == 0
    assert error.report not in capsys.readouterr().err  # the launcher shows it, once


def test_a_failure_is_reported_as_it_is_and_has_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = Fault("the run has made no progress\n\n    rank 1 stopped", 4)
    assert exit_reports.report_failure({RECORDS: str(tmp_path), "RANK": "0"}, error, since=12.5) == 4
    record = read_records(tmp_path / "0")[0]
    assert (record.code, record.error, record.details) == (4, "the run has made no progress", str(error))
    assert (record.is_report, record.time) == (True, 12.5)
    assert exit_reports.report_failure({"RANK": "0"}, error) == 4
    output = capsys.readouterr().err
    assert output.count(str(error)) == 1
    assert "Traceback" not in output


def test_a_collective_that_waited_too_long_is_a_hang(tmp_path: Path) -> None:
    environ = {RECORDS: str(tmp_path)}
    assert exit_reports.report_failure(environ, RuntimeError("Timed out waiting 300000ms for recv operation")) == 4
    assert read_records(tmp_path / "0")[0].lost_peer


def test_torchrun_is_not_notified_of_a_rank_that_was_asked_to_leave(tmp_path: Path) -> None:
    """Where nobody reads the record, the rank has to say it itself."""
    assert processes.record_exit({RECORDS: str(tmp_path), "RANK": "1"}, 75) == 0
    record = read_records(tmp_path / "0")[0]
    assert (record.rank, record.code, record.asked) == (1, 75, True)
    assert processes.record_exit({"RANK": "1"}, 75) == 75
    assert processes.record_interrupt({RECORDS: str(tmp_path), "RANK": "2"}) == 130
    assert [record.asked for record in read_records(tmp_path / "0")] == [True, False]


@pytest.mark.parametrize(("code", "again"), [(1, True), (4, True), (6, True), (2, False), (3, False), (5, False)])
def test_a_restart_reports_the_start_before_and_stops_where_it_is_of_no_use(
    code: int, again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0").mkdir()
    ExitRecord(1, code, 10.0, "what it was", "what it was, at length").write(tmp_path / "0")
    ExitRecord(0, 1, 9.0, "RuntimeError: closed", "...", lost_peer=True).write(tmp_path / "0")
    environ = {RECORDS: str(tmp_path), RESTART_COUNT: "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert processes.exit_code_after_restart({**environ, RESTART_COUNT: "0"}) is None
    assert processes.exit_code_after_restart(environ) == (None if again else code)
    assert ("restart 1 of 3, since rank 1 failed:\n\nwhat it was, at length" in caplog.text) == again
    records = [(record.rank, record.code, record.lost_peer) for record in read_records(tmp_path / "1")]
    assert records == ([] if again else [(1, code, False), (0, code, True)]), "the failure, and who only follows it"


def test_only_ranks_of_this_run_with_signal_handlers_get_signals(tmp_path: Path) -> None:
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "rank0.pid").write_text(str(ours.pid))
        (tmp_path / "rank1.pid").write_text(str(os.getpid()))  # not a child of this process
        assert ranks_with_handlers(tmp_path, os.getpid()) == [ours.pid]
    finally:
        ours.kill()
    assert wait_until(lambda: ranks_with_handlers(tmp_path, os.getpid()) == [], 30)  # dead, though not collected
    ours.wait()
    with handle_signals({RECORDS: str(tmp_path), "RANK": "3"}):
        assert (tmp_path / "0" / "rank3.pid").read_text() == str(os.getpid())
    assert not (tmp_path / "0" / "rank3.pid").exists()


def test_without_a_launcher_the_first_rank_of_a_machine_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UserError(Problem("training.steps", "out of range"))
    waits: list[float] = []
    monkeypatch.setattr(exit_reports.time, "sleep", waits.append)
    assert exit_reports.report_config_error({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, error) == 2
    assert waits == []
    assert exit_reports.report_config_error({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, error) == 2
    assert waits == [exit_reports.CONFIG_ERROR_WAIT_SECONDS]  # torchrun ends it here when the first one has left
    assert capsys.readouterr().err.count("training.steps") == 2


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_failed_rank_is_not_held_by_what_waits_at_the_exit(code: int) -> None:
    """A clean end runs what was registered for the exit; a failed one leaves at once, its words already out."""
    source = "import atexit, sys; from quadriga.resilience.exit_reports import end_process\n"
    source += "atexit.register(lambda: print('waited'))\nprint('last word'); end_process(int(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", source, str(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert ended.stdout == ("last word\n" if code else "last word\nwaited\n")


def test_a_run_over_nvshmem_ends_without_finalizers() -> None:
    source = "import atexit; from quadriga.resilience.exit_reports import end_process, skip_finalizers\n"
    source += "atexit.register(lambda: print('waited'))\nprint('last word'); skip_finalizers(); end_process(0)"
    ended = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout == "last word\n"


def test_an_error_of_the_network_is_not_taken_for_a_lost_rank(tmp_path: Path) -> None:
    exit_reports.report_failure({RECORDS: str(tmp_path)}, ConnectionRefusedError(111, "Connection refused"))
    assert not read_records(tmp_path / "0")[0].lost_peer
