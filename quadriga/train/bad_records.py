"""Logs the unreadable records that are skipped (`training.dataloader.on_bad_record = "skip"`)."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.data.loader import Loader
from quadriga.data.packing import SkippedRecord
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.metrics.events import EventLog

MAX_LOGGED = 10  # per rank and start of the run


class BadRecords:
    """The skipped records of one rank's rows. `bad_records` in `metrics.jsonl` is the count over all ranks."""

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
