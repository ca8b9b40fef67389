"""How a run ended: which rank's error is printed last, and which exit code is returned."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import EXIT_FAULT, EXIT_OK
from quadriga.launch.agent import FAILURES_FILE
from quadriga.log import logger
from quadriga.resilience.processes import ExitRecord, last_start, read_records


@dataclass(frozen=True)
class UnreportedExit:
    """A rank that ended without an exit record. `exitcode` -n means killed by signal n. `time` is in whole seconds."""

    rank: int
    pid: int
    exitcode: int
    time: float

    def __str__(self) -> str:
        if self.exitcode >= 0:
            return f"rank {self.rank} (process {self.pid}) exited with code {self.exitcode} and without a message"
        name = signal.Signals(-self.exitcode).name
        text = f"rank {self.rank} (process {self.pid}) was killed by {name}"
        if self.exitcode == -signal.SIGKILL:
            text += "\nThe kernel does this when the machine runs out of memory (see `dmesg`). A scheduler may, too."
        return text


def report_exit(folder: Path, ranks: int, code: int, received: Sequence[int]) -> int:
    """Print the error of the first failed rank, and return the exit code of the run.

    Args:
        folder: of the ranks' exit records and the agent's failures file.
        ranks: number of ranks on this machine.
        code: the agent's own exit code, negative if a signal killed it.
        received: the forwarded stop signals, in order.
    """
    records = read_records(last_start(folder))
    failed = [record for record in records if record.code != EXIT_OK and not record.asked]
    asked = next((record.code for record in records if record.asked), EXIT_OK)
    if code == EXIT_OK:
        return asked
    first = first_failed_rank(failed, unreported_exits(folder, records))
    if received and _caused_by_signal(received[0], first):
        if not failed and (asked or len(records) == ranks):
            return asked  # the ranks have reported the state of the run
        logger.error("stopped by %s", signal.Signals(received[0]).name)
        return 128 + received[0]
    if first is None:
        logger.error("torchrun ended with code %d before any rank reported an error; its output is above", code)
        return EXIT_FAULT
    if isinstance(first, UnreportedExit):
        logger.error("%s", first)
        return EXIT_FAULT
    logger.error("%s", first.details if first.is_report else f"rank {first.rank} failed first:\n\n{first.details}")
    return first.code


def _caused_by_signal(received: int, failure: ExitRecord | UnreportedExit | None) -> bool:
    """Whether a rank ended in this way because the run received a stop signal."""
    return not isinstance(failure, ExitRecord) or failure.lost_peer or failure.code == 128 + received


def unreported_exits(folder: Path, records: Sequence[ExitRecord]) -> list[UnreportedExit]:
    """The failed ranks that left no record, from the agent's failures file."""
    failures_file = folder / FAILURES_FILE
    ends = json.loads(failures_file.read_text()) if failures_file.exists() else {}
    reported = {record.rank for record in records}
    return [UnreportedExit(int(rank), **end) for rank, end in ends.items() if int(rank) not in reported]


def first_failed_rank(
    records: Sequence[ExitRecord], silent: Sequence[UnreportedExit]
) -> ExitRecord | UnreportedExit | None:
    """The first failure. A lost peer is a consequence of it, and so is SIGTERM: torchrun sends it to the survivors."""

    def order(failure: ExitRecord | UnreportedExit) -> tuple[bool, int, int]:
        # torchrun's times are in whole seconds. Within one second, a kill comes before the records of the peers, and a
        # record comes before a bare exit code.
        if isinstance(failure, UnreportedExit):
            return failure.exitcode == -signal.SIGTERM, int(failure.time), 0 if failure.exitcode < 0 else 2
        return failure.lost_peer, int(failure.time), 1

    failures: list[ExitRecord | UnreportedExit] = [*records, *silent]
    return min(failures, key=order, default=None)
