"""What the metrics tests share."""

from __future__ import annotations

import logging

import pytest


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines():
    """What goes to the `quadriga` logger while the test runs."""
    logger, kept = logging.getLogger("quadriga"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept.lines
    logger.removeHandler(kept)
    logger.setLevel(level)
