"""Which rank's end is shown and whose exit code is returned."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from quadriga.errors import EXIT_FAULT, EXIT_USAGE
from quadriga.launch.agent import FAILURES_FILE
from quadriga.launch.exit_status import UnreportedExit, first_failed_rank, report_exit
from quadriga.resilience import processes
from quadriga.resilience.processes import RECORDS, RESTART_COUNT, ExitRecord, read_records

REPORT = ExitRecord(1, EXIT_USAGE, 100.3, "data.jsonl, line 3: is not JSON", "report", is_report=True)
LOST = ExitRecord(1, EXIT_FAULT, 100.3, "lost", "traceback", lost_peer=True)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("unreported", "record", "first"),
    [
        (
            UnreportedExit(0, 7, EXIT_USAGE, 100),
            REPORT,
            "record",
        ),  # its time is cut to whole seconds: it may have been later
        (UnreportedExit(0, 7, EXIT_USAGE, 99), REPORT, "unreported"),
        (UnreportedExit(0, 7, -signal.SIGKILL, 100), REPORT, "unreported"),
        (UnreportedExit(0, 7, -signal.SIGTERM, 99), REPORT, "record"),  # torchrun ends survivors so
        (UnreportedExit(0, 7, EXIT_USAGE, 101), LOST, "unreported"),
    ],
)
def test_the_first_failure(unreported: UnreportedExit, record: ExitRecord, first: str, order: int) -> None:
    records = [record, LOST][::order]
    assert first_failed_rank(records, [unreported]) is (record if first == "record" else unreported)


def test_a_start_that_would_fail_the_same_way_again_ends_with_a_record_of_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torchrun's clock has whole seconds: without a record a rank that follows would seem to have failed first."""
    (tmp_path / "0").mkdir()
    failed = ExitRecord(1, EXIT_USAGE, time.time(), "line 3", "the report", is_report=True)
    failed.write(tmp_path / "0")
    for rank in ("0", "1"):
        environ = {RECORDS: str(tmp_path), RESTART_COUNT: "1", "RANK": rank, "WORLD_SIZE": "2"}
        assert processes.exit_code_after_restart(environ) == EXIT_USAGE
    assert {record.rank for record in read_records(tmp_path / "1")} == {0, 1}
    early = {rank: {"pid": 7, "exitcode": EXIT_USAGE, "time": int(failed.time)} for rank in (0, 1)}
    (tmp_path / FAILURES_FILE).write_text(json.dumps(early))
    assert report_exit(tmp_path, 2, EXIT_FAULT, []) == EXIT_USAGE
    assert [record.message for record in caplog.records] == ["the report"]
