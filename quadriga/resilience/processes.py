"""The process tree of a run: processes die with their parent, ranks leave exit records, and one run locks its folder.

The launcher starts torchrun's agent, and the agent starts the ranks. An environment variable of the launcher names a
folder. Each start of the ranks has its own folder in it, because torchrun may restart them. A rank writes there

    rank3.pid      while it handles signals as requests at the end of a step, so that they do not kill it
    rank3.json     its exit record, when it fails or ends

The launcher reads them to forward signals and to find the first error.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from quadriga.errors import (
    EXIT_FAULT,
    EXIT_NO_GOOD_CHECKPOINT,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_USAGE,
    Problem,
    UserError,
)
from quadriga.log import logger

RECORDS = "QUADRIGA_EXIT_RECORDS"  # the folder of the exit records of this machine's ranks
AGENT_PID = "QUADRIGA_AGENT_PID"  # the agent that started the ranks
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how often it has restarted the ranks
LOCK_NAME, LOCK_FLAGS = ".lock", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
LOCK_TIMEOUT_SECONDS = 3.0  # the last rank of a killed run needs some time to exit
INTERRUPTED = 130  # 128 + SIGINT
STOP_REQUESTED_KEY = "quadriga/stop_requested"  # store key: the ranks of a bare torchrun were asked to stop
FINAL_EXIT_CODES = {EXIT_USAGE, EXIT_NO_GOOD_CHECKPOINT, EXIT_NOT_FINITE}  # a restart would fail in the same way
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # request a save and an exit
SAVE_SIGNAL = signal.SIGUSR2  # requests a save
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Set PR_SET_PDEATHSIG: the kernel kills this process when the thread that started it ends (Linux only).

    `parent`: process id of the expected parent, if known. If it ended before the call, this process already has another
    parent, and exits at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(EXIT_FAULT)


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


def adopt_orphans() -> None:
    """Become the parent of the orphans of this process's children, so that it can reap them (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class ExitRecord:
    """How one rank ended. `time` in seconds since the epoch; `error` is one line, `details` the report or traceback.

    `is_report`: the details are a report, to be printed unchanged. `lost_peer`: this rank failed because another was
    gone. `asked`: no failure; the rank stopped on request with this code, and its exit code for torchrun was 0.
    """

    rank: int
    code: int
    time: float
    error: str = ""
    details: str = ""
    is_report: bool = False
    lost_peer: bool = False
    asked: bool = False

    def write(self, folder: Path) -> None:
        """Write the record into the folder that the launcher reads."""
        _write(folder / f"rank{self.rank}.json", json.dumps(asdict(self)))


def records_folder(environ: Mapping[str, str]) -> Path | None:
    """The records folder of this start of the ranks, created if needed; None if no launcher reads records."""
    folder = environ.get(RECORDS)
    if not folder or not Path(folder).is_dir():
        return None
    own = Path(folder, environ.get(RESTART_COUNT, "0"))
    own.mkdir(exist_ok=True)
    return own


def last_start(folder: Path) -> Path:
    """The records folder of the newest start of the ranks. Records of earlier starts do not count."""
    starts = [path for path in folder.iterdir() if path.name.isdecimal()]
    return max(starts, key=lambda path: int(path.name), default=folder / "0")


def read_records(folder: Path) -> list[ExitRecord]:
    """The records of all ranks of one start on this machine, by time."""
    records = [ExitRecord(**json.loads(path.read_text())) for path in folder.glob("rank*.json")]
    return sorted(records, key=lambda record: record.time)


def first_failure(records: list[ExitRecord]) -> ExitRecord | None:
    """The record of the first failure. The loss of a peer is a consequence, so it comes last."""
    failed = [record for record in records if record.code != EXIT_OK and not record.asked]
    return min(failed, key=lambda record: (record.lost_peer, record.time), default=None)


@contextmanager
def signal_handlers(
    handler: Callable[[int, FrameType | None], object], numbers: Iterable[int], even_if_ignored: Iterable[int] = ()
) -> Iterator[None]:
    """Handle signals within the context, except ignored ones: nohup sets SIGHUP to be ignored, and it stays ignored."""
    wanted = [*even_if_ignored, *(number for number in numbers if signal.getsignal(number) != signal.SIG_IGN)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def handle_signals(environ: Mapping[str, str]) -> Iterator[None]:
    """Inform the launcher, by the file `rankN.pid`, that this rank handles signals as stop requests."""
    folder = records_folder(environ)
    if folder is None:
        yield
        return
    note = folder / f"rank{environ.get('RANK', '0')}.pid"
    _write(note, str(os.getpid()))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def ranks_with_handlers(folder: Path, parent: int) -> list[int]:
    """The process ids of the ranks started by `parent` that handle signals as stop requests now."""
    pids = []
    for note in folder.glob("rank*.pid"):
        with suppress(FileNotFoundError):  # the rank has just removed its handlers
            pids.append(int(note.read_text()))
    return [pid for pid in pids if parent_of(pid) == parent]


def parent_of(pid: int) -> int | None:
    """The parent of a running process; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[1])


@contextmanager
def lock_run_folder(folder: str) -> Iterator[None]:
    """Lock `folder` for this process. The kernel releases the lock when the process ends, also after a kill.

    Raises:
        UserError: another run holds the lock, or the folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(os.path.join(folder, LOCK_NAME), LOCK_FLAGS | os.O_CREAT, 0o644)
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # a FIFO, for example, has no text
            os.close(handle)
            raise OSError(errno.EINVAL, f"{LOCK_NAME} is not a regular file")
    except OSError as error:
        fix = "choose a folder that you may write with --job.dump_folder"
        raise UserError(Problem("job.dump_folder", f"cannot be written: {error.strerror}", folder, fix=fix)) from None
    try:
        if _acquire_lock(handle, folder):
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            with suppress(OSError):  # a full disk: the text is only a note for others
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
                raise UserError(in_use(handle, folder)) from None
            time.sleep(0.1)
        except OSError as error:
            logger.warning(
                "%s: cannot be locked (%s); make sure that no other run writes there", folder, error.strerror
            )
            return False


def in_use(handle: int, folder: str) -> Problem:
    """The problem that another run holds the lock of the folder. `handle`: the lock file, with a line on its holder."""
    holder = " ".join(os.pread(handle, 1000, 0).decode(errors="replace").split()) or "another process"
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
        store = torchrun_store(environ)
        stored = store.get(STOP_REQUESTED_KEY) if store.check([STOP_REQUESTED_KEY]) else b""
        return int(stored) if re.fullmatch(rb"[1-9]\d{0,2}", stored) else None  # other processes can write this key
    failure = first_failure(read_records(folder.with_name(str(restart - 1))))
    if failure is not None and failure.code in FINAL_EXIT_CODES:
        failure.write(folder)
        if failure.rank != rank_of(environ):
            ExitRecord(rank_of(environ), failure.code, time.time(), failure.error, lost_peer=True).write(folder)
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
                torchrun_store(environ).set(STOP_REQUESTED_KEY, str(code))
        return code
    ExitRecord(rank_of(environ), code, time.time(), asked=asked).write(folder)
    return EXIT_OK


def record_interrupt(environ: Mapping[str, str]) -> int:
    """Record a Ctrl-C before training began, when there is nothing to save."""
    folder = records_folder(environ)
    if folder is not None:
        ExitRecord(rank_of(environ), INTERRUPTED, time.time()).write(folder)
    return INTERRUPTED


def rank_of(environ: Mapping[str, str]) -> int:
    return int(environ.get("RANK", "0"))


def torchrun_store(environ: Mapping[str, str]) -> Any:
    """A new connection to torchrun's store. None before torch is imported: a store alone is no reason to import it."""
    dist = sys.modules.get("torch.distributed")
    if dist is None:
        return None
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)


def _write(path: Path, text: str) -> None:
    """Write a file atomically, so that a reader never sees a partial file."""
    draft = path.with_suffix(f".draft{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
