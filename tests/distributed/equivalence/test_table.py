"""The table of layouts, row by row, on forked ranks: a sample with a narrow model here, all of it in `make test-all`.

With EQUIVALENCE_JSON=FILE in the environment the figures of all rows are written there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from training import one_rank

from quadriga.rehearsal.equivalence.rows import ROWS, Row
from quadriga.rehearsal.equivalence.trial import RowResult, RunFailed, Trials, summarize_results

ALL = [pytest.param(row, id=row.name) for row in ROWS]
SAMPLE = [pytest.param(row, id=row.name) for row in ROWS if not row.slow]
# The debug model's layers, heads and vocabulary, at an eighth of the cost: what a layout does does not ask for width.
NARROW = ("--model.dim", "64", "--model.ffn_dim", "176")


def forked(folder: Path, ranks: int, command: Sequence[str]) -> None:
    try:
        codes = run_ranks(one_rank, ranks, list(command), timeout=400, backend=None)
    except RankError as error:
        raise RunFailed(str(error)) from error
    if any(codes):
        raise RunFailed(f"exit codes {codes}")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("equivalence"), forked)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("narrow"), forked, NARROW)


@pytest.fixture(scope="module")
def verdicts() -> Iterator[list[RowResult]]:
    found: list[RowResult] = []
    yield found
    if (file := os.environ.get("EQUIVALENCE_JSON")) is not None:
        command = f"EQUIVALENCE_JSON=FILE python -m pytest tests/distributed/equivalence {' '.join(sys.argv[1:])}"
        Path(file).write_text(json.dumps(summarize_results(found, command), indent=1) + "\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL)
def test_a_layout_trains_as_one_process_does(row: Row, trials: Trials, verdicts: list[RowResult]) -> None:
    verdict = trials.run(row)
    verdicts.append(verdict)
    assert verdict.differences is not None, verdict.why
    assert verdict.met, verdict.differences


@pytest.mark.parametrize("row", SAMPLE)
def test_a_layout_trains_a_narrow_model_as_one_process_does(row: Row, narrow: Trials) -> None:
    verdict = narrow.run(row)
    assert verdict.differences is not None, verdict.why
    assert verdict.met, verdict.differences


def test_the_table_is_whole() -> None:
    """At least 60 rows up to 8 ranks; every axis alone, every pair, every triple; no row twice."""
    cuts = [{axis for axis, size in vars(row.degrees).items() if size > 1} for row in ROWS]
    assert len([row for row in ROWS if row.ranks <= 8]) >= 60
    assert max(row.ranks for row in ROWS) == 16
    assert {len(cut) for cut in cuts} == {1, 2, 3, 4}
    assert len({frozenset(cut) for cut in cuts if len(cut) == 2}) == 10
    assert len({frozenset(cut) for cut in cuts if len(cut) == 3}) == 10
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_wrong_gradient_is_found(narrow: Trials) -> None:
    """The comparison is worth something: a run with another rate of learning is past the tolerance."""
    other = Trials(narrow.folder / "other", forked, [*NARROW, "--optimizer.lr", "9e-4"])
    other.folder.mkdir()
    row = Row(ROWS[0].degrees)
    other._baselines[row.model] = narrow.baseline(row)
    assert not other.run(row).met
