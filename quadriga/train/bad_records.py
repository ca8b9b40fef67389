"""What is said of records that cannot be read and are left out (`training.dataloader.on_bad_record = "skip"`)."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.data.loader import Loader
from quadriga.data.packing import SkippedRecord
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.metrics.events import EventLog

MAX_LOGGED = 10  # by a rank, in one start of the run


class BadRecords:
    """Of one rank's rows. The count of all is `bad_records` in every record of `metrics.jsonl`."""

    def __init__(self, loader: Loader, events: EventLog) -> None:
        self._loader, self._events = loader, events
        self._logged = 0

    def log_skipped(self, step: int, records: Sequence[SkippedRecord]) -> None:
        """Name the records that were left out for the batch of `step`, as long as they are few."""
        for record in records[: MAX_LOGGED - self._logged]:
            try:
                where = self._loader.format_location(record)
            except UserError:  # the file went away since; that it did is no reason to end the run here
                where = f"shard {record.shard}, byte or row {record.number:,}"
            logger.warning("data: left out: %s: %s", where, record.what)
            self._events.log_event("bad_record", step, place=where, reason=record.what)
            self._logged += 1
            if self._logged == MAX_LOGGED:
                logger.warning("data: more records that are left out are counted (`bad_records`), not shown")
