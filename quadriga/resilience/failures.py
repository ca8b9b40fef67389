"""Collects the state of this rank when an error ends it, for the report and the event log."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quadriga.comm import collectives
from quadriga.config import Run
from quadriga.errors import Fault, UserError
from quadriga.metrics.events import EventLog
from quadriga.resilience import exit_reports
from quadriga.resilience.bad_steps import CommonFault
from quadriga.resilience.compiler import compile_error, failed_compilation
from quadriga.resilience.out_of_memory import is_out_of_memory, out_of_memory_fault
from quadriga.resilience.progress import Progress


@dataclass
class FailureContext:
    """The state of the run that a failure report needs."""

    progress: Progress
    events: EventLog | None = None  # None until the run is built
    last_step: Callable[[], int] = lambda: 0
    on_all_ranks: bool = False  # whether the same error ends all ranks

    def log_failure(self, error: BaseException) -> None:
        """Add the error that ended this rank to the event log, if the log exists already.

        The first rank alone logs errors that all ranks have, and the loss of another rank.
        """
        if self.events is None:
            return
        exit_reports.acquire_exit_lock()  # if the watchdog ends this rank, it has logged the cause
        line, events = _one_line(error), self.events
        lost_peer = exit_reports.lost_peer(error)
        if events.rank == 0 or not (lost_peer or self.on_all_ranks or isinstance(error, CommonFault)):
            events.log_event("fault", self.last_step(), error=line, lost_peer=lost_peer)


@contextmanager
def record_failure(run: Run, progress: Progress) -> Iterator[FailureContext]:
    """Write the error that ends the body into the event log.

    An out-of-memory error becomes a report with advice, and one of the compiler a report that names its key."""
    context = FailureContext(progress)
    try:
        yield context
    except Exception as error:
        report = _report_with_remedy(error, run, progress)
        context.log_failure(report or error)
        if report is None:
            raise
        raise report from error


def _report_with_remedy(error: BaseException, run: Run, progress: Progress) -> Fault | UserError | None:
    if is_out_of_memory(error):
        return out_of_memory_fault(error, run, progress, collectives.rank())
    failure = failed_compilation(error)
    return compile_error(failure, run) if failure is not None else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error.problems[0]).split())
    if isinstance(error, Fault):
        return str(error).splitlines()[0]
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
