"""What the processes of one run owe each other: to die with their parent, and to leave a note of how they ended.

The launcher starts torchrun's agent, the agent starts the ranks. The launcher names a folder in the environment; each
rank leaves a record there when it fails or ends, and the launcher reads them to tell whose error came first.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from quadriga.errors import EXIT_FAULT

RECORDS = "QUADRIGA_EXIT_RECORDS"  # the folder of the records of this machine's ranks
AGENT_PID = "QUADRIGA_AGENT_PID"  # the agent that started the ranks
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


@dataclass(frozen=True)
class ExitRecord:
    """How one rank ended. `time` in seconds since the epoch; `error` is one line, `details` the report or traceback.

    `user_error`: the details are a report, to be shown as it is. `lost_peer`: this rank failed since another was gone.
    """

    rank: int
    code: int
    time: float
    error: str = ""
    details: str = ""
    user_error: bool = False
    lost_peer: bool = False

    def write(self, folder: Path) -> None:
        """Leave the record under its final name at once, so that a reader never sees half of it."""
        path = folder / f"rank{self.rank}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)


def records_folder(environ: Mapping[str, str]) -> Path | None:
    """Where this rank leaves its record; None when no launcher waits for it."""
    folder = environ.get(RECORDS)
    return Path(folder) if folder and Path(folder).is_dir() else None


def read_records(folder: Path) -> list[ExitRecord]:
    """The records of all ranks of this machine, by time."""
    records = [ExitRecord(**json.loads(path.read_text())) for path in folder.glob("rank*.json")]
    return sorted(records, key=lambda record: record.time)
