"""Which rank's end is shown and whose exit code is returned."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from quadriga.errors import EXIT_FAULT, EXIT_USAGE
from quadriga.launch.agent import NOTE
from quadriga.launch.ending import Death, conclude, first_to_fail
from quadriga.resilience import process_guards
from quadriga.resilience.processes import RECORDS, RESTART_COUNT, ExitRecord, read_records

REPORT = ExitRecord(1, EXIT_USAGE, 100.3, "data.jsonl, line 3: is not JSON", "report", is_report=True)
LOST = ExitRecord(1, EXIT_FAULT, 100.3, "lost", "traceback", lost_peer=True)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("death", "record", "first"),
    [
        (Death(0, 7, EXIT_USAGE, 100), REPORT, "record"),  # its time is cut to whole seconds: it may have been later
        (Death(0, 7, EXIT_USAGE, 99), REPORT, "death"),
        (Death(0, 7, -signal.SIGKILL, 100), REPORT, "death"),
        (Death(0, 7, -signal.SIGTERM, 99), REPORT, "record"),  # torchrun ends survivors so
        (Death(0, 7, EXIT_USAGE, 101), LOST, "death"),
    ],
)
def test_the_first_failure(death: Death, record: ExitRecord, first: str, order: int) -> None:
    records = [record, LOST][::order]
    assert first_to_fail(records, [death]) is (record if first == "record" else death)


def test_a_start_that_would_fail_the_same_way_again_ends_with_a_record_of_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torchrun's clock has whole seconds: without a record a rank that follows would seem to have failed first."""
    (tmp_path / "0").mkdir()
    failed = ExitRecord(1, EXIT_USAGE, time.time(), "line 3", "the report", is_report=True)
    failed.write(tmp_path / "0")
    for rank in ("0", "1"):
        environ = {RECORDS: str(tmp_path), RESTART_COUNT: "1", "RANK": rank, "WORLD_SIZE": "2"}
        assert process_guards.end_of_the_start_before(environ) == EXIT_USAGE
    assert {record.rank for record in read_records(tmp_path / "1")} == {0, 1}
    early = {rank: {"pid": 7, "exitcode": EXIT_USAGE, "time": int(failed.time)} for rank in (0, 1)}
    (tmp_path / NOTE).write_text(json.dumps(early))
    assert conclude(tmp_path, 2, EXIT_FAULT, []) == EXIT_USAGE
    assert [record.message for record in caplog.records] == ["the report"]
