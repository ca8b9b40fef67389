"""Every reader of foreign bytes, on seeded damage. `make fuzz` runs 20,000 cases each and records the count."""

from __future__ import annotations

import pytest
from fuzzing import Reader, fuzz, readers

ALL = readers()


def run(reader: Reader, cases: range) -> None:
    failures = fuzz(reader, cases)
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("reader", ALL, ids=lambda reader: reader.name)
def test_100_cases(reader: Reader):
    run(reader, range(100))


@pytest.mark.more
@pytest.mark.parametrize("reader", ALL, ids=lambda reader: reader.name)
def test_300_cases(reader: Reader):
    run(reader, range(100, 400))


@pytest.mark.slow
@pytest.mark.parametrize("reader", ALL, ids=lambda reader: reader.name)
def test_3000_cases(reader: Reader):
    run(reader, range(400, 3400))
