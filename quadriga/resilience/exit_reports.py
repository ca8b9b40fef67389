"""How a rank reports the error that ends it: an exit record for the launcher, else the report on stderr, once."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_STALLED, Fault, UserError, printable
from quadriga.log import logger
from quadriga.resilience.processes import ExitRecord, rank_of, records_folder, torchrun_store

CONFIG_ERROR_WAIT_SECONDS = 10.0
EXIT_REPORT_SECONDS = 60.0  # longer than any report takes
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
_without_finalizers = threading.Event()  # set: a successful exit does not run the interpreter's finalizers


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
        logger.error("rank %d failed:\n\n%s", rank_of(environ), _traceback(error))
    elif _is_first_to_report(report, environ):
        print(printable(report, keep="\n\t"), file=sys.stderr)
    return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError | Fault):
        return error.exit_code
    return EXIT_STALLED if _message_contains(error, TIMED_OUT) else EXIT_FAULT


def lost_peer(error: BaseException) -> bool:
    """Whether the error is a consequence of another rank that is gone."""
    return _message_contains(error, LOST_PEER)


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
        rank=rank_of(environ),
        code=_exit_code(error),
        time=since or time.time(),
        error=line.splitlines()[0],
        details=report or _traceback(error),
        is_report=report is not None,
        lost_peer=lost_peer(error),
    )
    record.write(folder)
    return record


def skip_finalizers() -> None:
    """Let `end_process` exit without the interpreter's finalizers, also after success."""
    _without_finalizers.set()


def end_process(code: int) -> NoReturn:
    """Exit with `code`. A failed rank skips cleanup, because a communicator that waits for others would block it."""
    if code == EXIT_OK and not _without_finalizers.is_set():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _is_first_to_report(report: str, environ: Mapping[str, str]) -> bool:
    """Whether no other rank of this torchrun has printed the same report. A counter in torchrun's store decides."""
    if int(environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        store = torchrun_store(environ)
        return store is None or store.add("quadriga/report/" + hashlib.sha256(report.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # the store is gone: a report that appears twice is better than none
        return True
