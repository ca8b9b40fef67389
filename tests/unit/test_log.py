"""Who prints what: progress of the ranks in LOG_RANK, warnings of all."""

from __future__ import annotations

import pytest

from quadriga.log import logger, logging_ranks, start_logging


@pytest.mark.parametrize(
    ("chosen", "rank", "expected"),
    [
        (None, "0", ["progress", "a warning"]),
        (None, "1", ["a warning"]),
        ("0,1", "1", ["[rank 1] progress", "[rank 1] a warning"]),
        ("0,1", "2", ["[rank 2] a warning"]),
        ("2", "2", ["progress", "a warning"]),
        ("2", "0", ["a warning"]),
    ],
)
def test_log_rank_chooses_who_prints_progress(chosen: str | None, rank: str, expected: list[str], capsys) -> None:
    start_logging({"RANK": rank, "WORLD_SIZE": "4", **({"LOG_RANK": chosen} if chosen else {})})
    logger.info("progress")
    logger.warning("a warning")
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("text", ["\u0663", "0,,1", "1_0", "+1"])
def test_log_rank_is_a_list_of_plain_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="not a list of ranks"):
        logging_ranks({"LOG_RANK": text})
