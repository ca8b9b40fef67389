"""What is said of records that cannot be read and are left out (`training.dataloader.on_bad_record = "skip"`)."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.data.loader import Loader
from quadriga.data.packing import LeftOut
from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.metrics.events import Events

MOST_SHOWN = 10  # by a rank, in one start of the run


class BadRecords:
    """Of one rank's rows. The count of all is `bad_records` in every record of `metrics.jsonl`."""

    def __init__(self, loader: Loader, events: Events) -> None:
        self._loader, self._events = loader, events
        self._told = 0

    def tell(self, step: int, left_out: Sequence[LeftOut]) -> None:
        """Name the records that were left out for the batch of `step`, as long as they are few."""
        for record in left_out[: MOST_SHOWN - self._told]:
            try:
                where = self._loader.place(record)
            except UserError:  # the file went away since; that it did is no reason to end the run here
                where = f"shard {record.shard}, byte or row {record.number:,}"
            logger.warning("data: left out: %s: %s", where, record.what)
            self._events.tell("bad_record", step, place=where, reason=record.what)
            self._told += 1
            if self._told == MOST_SHOWN:
                logger.warning("data: more records that are left out are counted (`bad_records`), not shown")
