"""What is checked and recorded after every step, besides metrics: documents, bad steps, replicas of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quadriga.data.loader import Loader
from quadriga.data.streams import SkippedRecord
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.metrics.documents import DocumentLog
from quadriga.metrics.events import EventLog
from quadriga.metrics.jsonl import Record
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience.bad_steps import BadSteps
from quadriga.resilience.replica_checks import ReplicaCheck

MAX_LOGGED = 10  # per rank and start of the run


class BadRecords:
    """Logs the unreadable records of one rank's rows that are skipped (`training.dataloader.on_bad_record = "skip"`).

    `bad_records` in `metrics.jsonl` is the count over all ranks.
    """

    def __init__(self, loader: Loader, events: EventLog) -> None:
        self._loader, self._events = loader, events
        self._logged = 0

    def log_skipped(self, step: int, records: Sequence[SkippedRecord]) -> None:
        """Log the records that were skipped for the batch of `step`, up to `MAX_LOGGED` in total."""
        for record in records[: MAX_LOGGED - self._logged]:
            try:
                where = self._loader.format_location(record)
            except UserError:  # the file is gone by now, which is no reason to end the run
                where = f"shard {record.shard}, byte or row {record.number:,}"
            logger.warning("data: record skipped: %s: %s", where, record.what)
            self._events.log_event("bad_record", step, place=where, reason=record.what)
            self._logged += 1
            if self._logged == MAX_LOGGED:
                logger.warning("data: further skipped records are counted (`bad_records`), but not listed")


@dataclass(frozen=True)
class Checks:
    """The checks of one rank. `documents`: None if they are not logged, or another rank reads the same rows."""

    documents: DocumentLog | None
    bad_steps: BadSteps
    replicas: ReplicaCheck
    bad_records: BadRecords | None = None  # None if another rank reads the same rows

    def after_step(self, metrics: StepMetrics, record: Record | None) -> None:
        """`record`: the step's, if it has one. Raises CommonFault on all ranks if the run must stop."""
        if self.documents is not None:
            self.documents.write(metrics.step, metrics.documents)
        if self.bad_records is not None:
            self.bad_records.log_skipped(metrics.step, metrics.skipped_records)
        self.bad_steps.check(metrics, record["skipped_steps"] if record else None)
        if self.replicas.is_due(metrics.step):
            self.replicas.compare(metrics.step)

    def before_save(self) -> None:
        """Check pending steps before a save, so that a bad one stops the run first. Raises as `after_step`."""
        self.bad_steps.check_pending()

    def close(self) -> None:
        if self.documents is not None:
            self.documents.close()
