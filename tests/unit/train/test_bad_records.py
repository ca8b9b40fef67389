"""What is told of records that are left out, also where their file has gone away in the meantime."""

from __future__ import annotations

from quadriga.data.packing import LeftOut
from quadriga.errors import Problem, UserError
from quadriga.train.bad_records import MOST_SHOWN, BadRecords


class FileGone:
    def __init__(self) -> None:
        self.asked = 0

    def place(self, record: LeftOut) -> str:
        self.asked += 1
        raise UserError(Problem("a.jsonl", "there is no such file"))


class Told(list):
    def tell(self, event: str, step: int, **fields: str) -> None:
        self.append((event, step, fields["place"], fields["reason"]))


def test_a_file_that_went_away_ends_no_run_and_only_what_is_shown_is_looked_up():
    loader, events = FileGone(), Told()
    bad = BadRecords(loader, events)
    bad.tell(5, [LeftOut(1, 3, 70_000, "not JSON")])
    assert events == [("bad_record", 5, "shard 3, byte or row 70,000", "not JSON")]
    bad.tell(6, [LeftOut(nth, 3, 0, "not JSON") for nth in range(2, 40)])
    bad.tell(7, [LeftOut(40, 3, 0, "not JSON")])
    assert loader.asked == len(events) == MOST_SHOWN
