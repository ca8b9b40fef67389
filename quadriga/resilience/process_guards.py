"""Guards of a rank's process: no orphaned rank, no two runs in one folder, and an exit record of every failure."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from quadriga.errors import (
    EXIT_FAULT,
    EXIT_NO_GOOD_CHECKPOINT,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_STALLED,
    EXIT_USAGE,
    Fault,
    Problem,
    UserError,
    printable,
)
from quadriga.log import logger
from quadriga.resilience.processes import (
    AGENT_PID,
    RESTART_COUNT,
    ExitRecord,
    die_with_parent,
    first_failure,
    read_records,
    records_folder,
)

LOCK_NAME = ".lock"
LOCK_TIMEOUT_SECONDS = 3.0  # the last rank of a killed run needs some time to exit
CONFIG_ERROR_WAIT_SECONDS = 10.0
EXIT_REPORT_SECONDS = 60.0  # longer than any report takes
INTERRUPTED = 130  # 128 + SIGINT
STOP_REQUESTED_KEY = "quadriga/stop_requested"  # store key: the ranks of a bare torchrun were asked to stop
FINAL_EXIT_CODES = {EXIT_USAGE, EXIT_NO_GOOD_CHECKPOINT, EXIT_NOT_FINITE}  # a restart would fail in the same way
# Parts of the error messages with which gloo, NCCL and the rendezvous store report a missing or lost peer.
TIMED_OUT = ("timed out waiting", "watchdog caught collective operation timeout")
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "socket closed",
    "recvvalue failed",
    "failed to recv",
    "communicator was aborted",
    "did not signal within",
    *TIMED_OUT,
)


def die_with_torchrun(environ: Mapping[str, str]) -> None:
    """Kill this rank when the torchrun that started it ends, also by SIGKILL.

    This does nothing in a process that was started by hand: `nohup python -m quadriga.train &` must outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return
    agent = environ.get(AGENT_PID)
    die_with_parent(int(agent) if agent else None)
    if not agent and os.getppid() == 1 and not _is_python(1):
        os._exit(EXIT_FAULT)  # a bare torchrun (itself process 1 in some containers) ended before the call above


def _is_python(pid: int) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("python")
    except OSError:  # a process of another user, so not the torchrun of this run
        return False


@contextmanager
def lock_run_folder(folder: str) -> Iterator[None]:
    """Lock `folder` for this process. The kernel releases the lock when the process ends, also after a kill.

    Raises:
        UserError: another run holds the lock, or the folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(os.path.join(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        fix = "choose a folder that you may write with --job.dump_folder"
        raise UserError(Problem("job.dump_folder", f"cannot be written: {error.strerror}", folder, fix=fix)) from None
    try:
        if _acquire_lock(handle, folder):
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _acquire_lock(handle: int, folder: str) -> bool:
    """Lock the open file; wait `LOCK_TIMEOUT_SECONDS` for a holder that exits. False if the file system lacks locks."""
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(_in_use(handle, folder)) from None
            time.sleep(0.1)
        except OSError as error:
            logger.warning(
                "%s: cannot be locked (%s); make sure that no other run writes there", folder, error.strerror
            )
            return False


def _in_use(handle: int, folder: str) -> Problem:
    holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
    fix = "wait for that run to end, stop it, or choose another folder with --job.dump_folder"
    return Problem("job.dump_folder", f"this run folder is in use by {holder}", folder, fix=fix)


def exit_code_after_restart(environ: Mapping[str, str]) -> int | None:
    """After a restart by torchrun, log what ended the start before. Call it after torch is imported.

    Returns the exit code with which this start must end at once, if the run was asked to stop or would fail in the same
    way again; else None.
    """
    restart, folder = int(environ.get(RESTART_COUNT, "0")), records_folder(environ)
    if restart == 0:
        return None
    if folder is None:
        store = _store(environ)
        stored = store.get(STOP_REQUESTED_KEY) if store.check([STOP_REQUESTED_KEY]) else b""
        return int(stored) if re.fullmatch(rb"[1-9]\d{0,2}", stored) else None  # other processes can write this key
    failure = first_failure(read_records(folder.with_name(str(restart - 1))))
    if failure is not None and failure.code in FINAL_EXIT_CODES:
        failure.write(folder)
        if failure.rank != _rank(environ):
            ExitRecord(_rank(environ), failure.code, time.time(), failure.error, lost_peer=True).write(folder)
        return failure.code
    if environ.get("LOCAL_RANK", "0") == "0":
        cause = f"rank {failure.rank} failed:\n\n{failure.details}\n" if failure else "a rank was killed"
        logger.warning("restart %d of %s, since %s", restart, environ.get("TORCHELASTIC_MAX_RESTARTS", "?"), cause)
    return None


def record_exit(environ: Mapping[str, str], code: int) -> int:
    """Record an exit that is no failure. A `code` other than 0 means that this rank was asked to stop.

    Returns the exit code for torchrun. If the launcher reads the record, this is 0, because on another code torchrun
    would kill the ranks that exit later, or restart all ranks.
    """
    asked, folder = code != EXIT_OK, records_folder(environ)
    if folder is None:
        if asked and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            with suppress(RuntimeError):
                _store(environ).set(STOP_REQUESTED_KEY, str(code))
        return code
    ExitRecord(_rank(environ), code, time.time(), asked=asked).write(folder)
    return EXIT_OK


def record_interrupt(environ: Mapping[str, str]) -> int:
    """Record a Ctrl-C before training began, when there is nothing to save."""
    folder = records_folder(environ)
    if folder is not None:
        ExitRecord(_rank(environ), INTERRUPTED, time.time()).write(folder)
    return INTERRUPTED


def report_config_error(environ: Mapping[str, str], error: UserError) -> int:
    """Report an error of the configuration. All ranks of a machine have the same error, so the first rank prints it.

    The others must not exit first, because torchrun would then kill the first rank while it prints. They wait until
    torchrun kills them, and print the error themselves after `CONFIG_ERROR_WAIT_SECONDS`.
    """
    folder = records_folder(environ)
    if folder is not None:
        _write_exit_record(folder, environ, error)  # the launcher prints it
        return error.exit_code
    if int(environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(CONFIG_ERROR_WAIT_SECONDS)
    print(error.report, file=sys.stderr)
    return error.exit_code


_exit_lock = threading.RLock()


def acquire_exit_lock() -> None:
    """Let only this thread report the end of this rank. If another thread reports already, wait for the exit."""
    if not _exit_lock.acquire(blocking=False):
        time.sleep(EXIT_REPORT_SECONDS)


def report_failure(environ: Mapping[str, str], error: BaseException, since: float | None = None) -> int:
    """Report the error that ended this rank and return the exit code.

    The report is complete, or one line if the launcher prints the first failure completely. `since`: time of the
    failure in seconds since the epoch; None: now.
    """
    acquire_exit_lock()
    folder = records_folder(environ)
    if folder is not None:
        record = _write_exit_record(folder, environ, error, since)
        logger.error("rank %d failed: %s", record.rank, record.error)
        return record.code
    report = _report_text(error)
    if report is None:
        logger.error("rank %d failed:\n\n%s", _rank(environ), _traceback(error))
    elif _is_first_to_report(report, environ):
        print(printable(report, keep="\n\t"), file=sys.stderr)
    return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError | Fault):
        return error.exit_code
    return EXIT_STALLED if _message_contains(error, TIMED_OUT) else EXIT_FAULT


def _message_contains(error: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _report_text(error: BaseException) -> str | None:
    """The report of an error, printed without a traceback; None for an error that needs its traceback."""
    if isinstance(error, UserError):
        return error.report
    return str(error) if isinstance(error, Fault) else None


def _write_exit_record(
    folder: Path, environ: Mapping[str, str], error: BaseException, since: float | None = None
) -> ExitRecord:
    report, text = _report_text(error), "".join(traceback.format_exception_only(error)).strip()
    line = str(error.problems[0]) if isinstance(error, UserError) else report or text
    record = ExitRecord(
        rank=_rank(environ),
        code=_exit_code(error),
        time=since or time.time(),
        error=line.splitlines()[0],
        details=report or _traceback(error),
        is_report=report is not None,
        lost_peer=_message_contains(error, LOST_PEER),
    )
    record.write(folder)
    return record


def end_process(code: int) -> NoReturn:
    """Exit with `code`. A failed rank skips cleanup, because a communicator that waits for others would block it."""
    if code == EXIT_OK:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _rank(environ: Mapping[str, str]) -> int:
    return int(environ.get("RANK", "0"))


def _is_first_to_report(report: str, environ: Mapping[str, str]) -> bool:
    """Whether no other rank of this torchrun has printed the same report. A counter in torchrun's store decides."""
    if int(environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        store = _store(environ)
        return store is None or store.add("quadriga/report/" + hashlib.sha256(report.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # the store is gone: a report that appears twice is better than none
        return True


def _store(environ: Mapping[str, str]) -> Any:
    """A new connection to torchrun's store. None before torch is imported: a store alone is no reason to import it."""
    dist = sys.modules.get("torch.distributed")
    if dist is None:
        return None
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
