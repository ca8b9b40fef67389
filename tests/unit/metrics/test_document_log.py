"""What each step read, written by several ranks and attempts, read back as one run."""

from __future__ import annotations

import json

import pytest

from quadriga.errors import UserError
from quadriga.metrics.documents import DocumentLog, read_documents


def write(folder, rank: int, attempt: int, first_row: int, steps: dict[int, list[list[tuple[int, int, int]]]]) -> None:
    log = DocumentLog(folder, rank=rank, attempt=attempt, first_row=first_row)
    for step, rows in steps.items():
        log.write(step, rows)
    log.close()


def test_rows_of_several_ranks_come_together_by_step_and_row(tmp_path):
    write(tmp_path, 1, 1, 2, {1: [[(0, 5, 0)], []], 2: [[(0, 5, 0), (0, 6, 10)], [(1, 0, 0)]]})
    write(tmp_path, 0, 1, 0, {1: [[(0, 1, 0)], [(0, 2, 0)]], 2: [[(0, 1, 0)], [(0, 2, 7)]]})
    assert read_documents(tmp_path) == {
        1: {0: ["0:1:0"], 1: ["0:2:0"], 2: ["0:5:0"], 3: []},
        2: {0: ["0:1:0"], 1: ["0:2:7"], 2: ["0:5:0", "0:6:10"], 3: ["1:0:0"]},
    }


def test_what_an_attempt_replayed_or_gave_up_is_that_of_the_newest(tmp_path):
    """Four steps on two ranks; from step 3 on one rank; then from step 4 on two again, one of them killed early."""
    for rank in (0, 1):
        write(tmp_path, rank, 1, rank, {step: [[(0, rank, step)]] for step in (1, 2, 3, 4)})
    write(tmp_path, 0, 2, 0, {step: [[(2, 0, step)], [(2, 1, step)]] for step in (3, 4, 5)})
    write(tmp_path, 1, 3, 1, {4: [[(3, 1, 4)]]})
    write(tmp_path, 0, 3, 0, {4: [[(3, 0, 4)]]})
    with (tmp_path / "documents/rank1.jsonl").open("a") as file:
        file.write('{"step": 5, "attempt": 3, "ro')
    assert read_documents(tmp_path) == {
        1: {0: ["0:0:1"], 1: ["0:1:1"]},
        2: {0: ["0:0:2"], 1: ["0:1:2"]},
        3: {0: ["2:0:3"], 1: ["2:1:3"]},
        4: {0: ["3:0:4"], 1: ["3:1:4"]},
    }


def test_nothing_written_is_nothing_read_and_a_broken_line_is_named(tmp_path):
    assert read_documents(tmp_path) == {}
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/rank0.jsonl").write_text(json.dumps({"step": 1, "rows": {}}) + "\n")
    with pytest.raises(UserError, match=r"rank0\.jsonl, line 1"):
        read_documents(tmp_path)
