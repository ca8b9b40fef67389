"""The event log: whole lines, in order, and a lost one is reported once."""

from __future__ import annotations

from quadriga.metrics.events import EVENTS_NAME, EventLog, read_events
from quadriga.metrics.jsonl import next_attempt


def test_what_is_logged_is_read_back_and_torn_lines_are_left_out(tmp_path):
    EventLog(tmp_path, 0, 1).log_event("start", 0, world_size=2)
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"event": "fau')  # torn by a kill: the next start cuts it
    later = EventLog(tmp_path, 0, 2)
    later.log_event("save_end", 4, bytes=12)
    events_read = [(event["event"], event["attempt"], event["step"]) for event in read_events(tmp_path)]
    assert events_read == [("start", 1, 0), ("save_end", 2, 4)]
    assert next_attempt(tmp_path / EVENTS_NAME) == 3


def test_an_event_log_that_cannot_be_written_is_reported_once_and_ends_nothing(tmp_path, lines):
    events = EventLog(tmp_path / "none", 1, 1)
    events.log_event("fault", 3, error="x")
    events.log_event("fault", 4, error="y")
    assert len(lines) == 1
    assert "events.jsonl cannot be written (No such file or directory)" in lines[0]
    assert next_attempt(tmp_path / EVENTS_NAME) == 1
