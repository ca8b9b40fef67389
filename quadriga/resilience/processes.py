"""The process tree of a run: processes die with their parent, and ranks leave exit records.

The launcher starts torchrun's agent, and the agent starts the ranks. An environment variable of the launcher names a
folder. Each start of the ranks has its own folder in it, because torchrun may restart them. A rank writes there

    rank3.pid      while it handles signals as requests at the end of a step, so that they do not kill it
    rank3.json     its exit record, when it fails or ends

The launcher reads them to forward signals and to find the first error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from quadriga.errors import EXIT_FAULT, EXIT_OK

RECORDS = "QUADRIGA_EXIT_RECORDS"  # the folder of the exit records of this machine's ranks
AGENT_PID = "QUADRIGA_AGENT_PID"  # the agent that started the ranks
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how often it has restarted the ranks
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


def _write(path: Path, text: str) -> None:
    """Write a file atomically, so that a reader never sees a partial file."""
    draft = path.with_suffix(f".draft{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
