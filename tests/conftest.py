"""What every test may count on: the project is importable, seeds are fixed, and no test reaches the network."""

from __future__ import annotations

import logging
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# How long an example takes, and how long it takes to make one, says nothing on a machine that does other things too.
hypothesis.settings.register_profile("quadriga", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("quadriga")

LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}


# The files that take longest begin first: no worker is left alone with one when the others have nothing left to do.
LONGEST = ("test_mutants.py", "test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    if "torch" in sys.modules:  # tests of the torch-free packages do not pay for the import
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)  # threads that wait for each other are slow where workers share cores


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """An entry point that is called in this process attaches its handler for good; the next test has a logger of its
    own."""
    logger = logging.getLogger("quadriga")
    before = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, _ = before
    logger.setLevel(before[2])


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this machine fails at once and says where it wanted to go."""
    connect = socket.socket.connect

    def local_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)


@pytest.fixture
def root() -> Path:
    """The repository's root folder."""
    return ROOT
