"""What is known of this rank when something ends it, brought together: for the report, and for the run's ledger."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quadriga.comm import collectives
from quadriga.config import Run
from quadriga.errors import Fault, UserError
from quadriga.metrics.events import Events
from quadriga.resilience import out_of_memory, process_guards
from quadriga.resilience.bad_steps import CommonFault
from quadriga.resilience.progress import Progress


@dataclass
class Witness:
    """What there is of the run so far."""

    progress: Progress
    events: Events | None = None  # from when the run is built
    last_step: Callable[[], int] = lambda: 0
    common: bool = False  # whether what ends this rank ends all, alike

    def tell(self, error: BaseException) -> None:
        """Add what ended this rank to the ledger, which is kept from when the run is built. What all ranks meet alike,
        and the loss of another rank, the first rank alone tells."""
        if self.events is None:
            return
        process_guards.take_the_word()  # where the watchdog ends this rank, it has told why
        line, events = _in_a_line(error), self.events
        lost_peer = isinstance(error, RuntimeError) and any(
            sign in str(error).lower() for sign in process_guards.LOST_PEER
        )
        if events.rank == 0 or not (lost_peer or self.common or isinstance(error, CommonFault)):
            events.tell("fault", self.last_step(), error=line, lost_peer=lost_peer)


@contextmanager
def witnessed(run: Run, progress: Progress) -> Iterator[Witness]:
    """Write what ends the body into the ledger, and say of a lack of memory where it was met and what would help."""
    witness = Witness(progress)
    try:
        yield witness
    except Exception as error:
        if not out_of_memory.is_out_of_memory(error):
            witness.tell(error)
            raise
        told = out_of_memory.fault(error, run, witness.progress, collectives.rank())
        witness.tell(told)
        raise told from error


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error.problems[0]).split())
    if isinstance(error, Fault):
        return str(error).splitlines()[0]
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
