"""What the processes of one run owe each other: to die with their parent, and to leave a note of how they ended.

The launcher starts torchrun's agent, the agent starts the ranks. The launcher names a folder in the environment, in
which every start of the ranks (torchrun may restart them) has a folder of its own. A rank leaves there

    rank3.pid      while signals are requests to it that it answers at the end of a step, instead of its death
    rank3.json     when it fails or ends: how

and the launcher reads them to deliver signals, and to tell whose error came first.
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

RECORDS = "QUADRIGA_EXIT_RECORDS"  # the folder of the records of this machine's ranks
AGENT_PID = "QUADRIGA_AGENT_PID"  # the agent that started the ranks
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun's: how often it has started the ranks again
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel (Linux alone has a way) to kill this process when the thread that started it ends.

    `parent` is the process that is meant, where it is known: if it ended before the kernel was asked, this process has
    another parent by now and leaves at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(EXIT_FAULT)


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, so that it can be collected (Linux alone has a way)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class ExitRecord:
    """How one rank ended. `time` in seconds since the epoch; `error` is one line, `details` the report or traceback.

    `is_report`: the details are a report, to be shown as it is. `lost_peer`: this rank failed since another was gone.
    `asked`: no failure; it left with this code since it was asked to, and torchrun was told 0.
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
        """Leave the record where the launcher looks."""
        _write(folder / f"rank{self.rank}.json", json.dumps(asdict(self)))


def records_folder(environ: Mapping[str, str]) -> Path | None:
    """Where this rank leaves its record, made for this start of the ranks; None when no launcher waits for it."""
    folder = environ.get(RECORDS)
    if not folder or not Path(folder).is_dir():
        return None
    own = Path(folder, environ.get(RESTART_COUNT, "0"))
    own.mkdir(exist_ok=True)
    return own


def last_start(folder: Path) -> Path:
    """The records folder of the newest start of the ranks: what an earlier one left decides nothing."""
    starts = [path for path in folder.iterdir() if path.name.isdecimal()]
    return max(starts, key=lambda path: int(path.name), default=folder / "0")


def read_records(folder: Path) -> list[ExitRecord]:
    """The records of all ranks of one start on this machine, by time."""
    records = [ExitRecord(**json.loads(path.read_text())) for path in folder.glob("rank*.json")]
    return sorted(records, key=lambda record: record.time)


def first_failure(records: list[ExitRecord]) -> ExitRecord | None:
    """The record of what went wrong first; a lost peer is a consequence."""
    failed = [record for record in records if record.code != EXIT_OK and not record.asked]
    return min(failed, key=lambda record: (record.lost_peer, record.time), default=None)


@contextmanager
def handle_signals(environ: Mapping[str, str]) -> Iterator[None]:
    """Let the launcher know that this rank takes signals as stop requests."""
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
    """The process ids of the ranks, started by `parent`, that take signals as stop requests now."""
    pids = []
    for note in folder.glob("rank*.pid"):
        with suppress(FileNotFoundError):  # it has stopped to handle them just now
            pids.append(int(note.read_text()))
    return [pid for pid in pids if parent_of(pid) == parent]


def parent_of(pid: int) -> int | None:
    """The parent of a running process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[1])


def _write(path: Path, text: str) -> None:
    """Write a file under its final name at once, so that a reader never sees half of it."""
    draft = path.with_suffix(f".draft{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
