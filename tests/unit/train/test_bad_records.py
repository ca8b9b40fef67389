"""What is told of records that are left out, also where their file has gone away in the meantime."""

from __future__ import annotations

from quadriga.data.streams import SkippedRecord
from quadriga.errors import Problem, UserError
from quadriga.train.checks import MAX_LOGGED, BadRecords


class FileGone:
    def __init__(self) -> None:
        self.asked = 0

    def format_location(self, record: SkippedRecord) -> str:
        self.asked += 1
        raise UserError(Problem("a.jsonl", "there is no such file"))


class LoggedEvents(list):
    def log_event(self, event: str, step: int, **fields: str) -> None:
        self.append((event, step, fields["place"], fields["reason"]))


def test_a_file_that_went_away_ends_no_run_and_only_what_is_shown_is_looked_up():
    loader, events = FileGone(), LoggedEvents()
    bad = BadRecords(loader, events)
    bad.log_skipped(5, [SkippedRecord(1, 3, 70_000, "not JSON")])
    assert events == [("bad_record", 5, "shard 3, byte or row 70,000", "not JSON")]
    bad.log_skipped(6, [SkippedRecord(nth, 3, 0, "not JSON") for nth in range(2, 40)])
    bad.log_skipped(7, [SkippedRecord(40, 3, 0, "not JSON")])
    assert loader.asked == len(events) == MAX_LOGGED
