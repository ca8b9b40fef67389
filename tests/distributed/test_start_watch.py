"""A start that hangs ends in time and says where, on one rank too; one that gets on may take as long as it likes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, one_rank

from quadriga.metrics.jsonl import read_metrics
from quadriga.resilience.processes import RECORDS, ExitRecord, read_records

LIMIT = 8  # comm.init_timeout_seconds; a start stands still after 0.7 of it
SHORT = (*TINY, f"--comm.init_timeout_seconds={LIMIT}", "--training.steps=2", "--comm.trace_buf_size=500")


def spins() -> None:
    """What following `__cause__` in a cycle did: the rank works all the time, and on nothing."""
    error: BaseException | None = ValueError()
    error.__cause__ = error
    while error is not None:
        error = error.__cause__


def sleeps() -> None:
    time.sleep(1000)


def downloads() -> None:
    """12 s of a connection that gives a little now and then."""
    with open(os.devnull, "wb") as file:
        for _ in range(24):
            time.sleep(0.5)
            os.write(file.fileno(), bytes(5000))


def compiles() -> None:
    """12 s of a compiler, which is a process of its own; its parent only waits."""
    work = "import time; end = time.monotonic() + 12\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)


def run_with_delay(folder: str, place: str, how: Callable[[], None], who: int) -> int:
    """A run in which rank `who` does something else first in the function named."""
    from quadriga.comm import process_group
    from quadriga.train import build, loop
    from quadriga.train.step import WholeForwardBackward

    holder, name = {
        "rendezvous": (process_group, "start"),
        "data": (build, "build_loader"),
        "weights": (build, "build_parts"),
        "first step": (WholeForwardBackward, "train"),
        "checkpoints": (loop.header, "log_if_finished"),
    }[place]
    inner, left = getattr(holder, name), [how]

    def outer(*given, **named):
        if int(os.environ["RANK"]) == who and left:
            left.pop()()
        return inner(*given, **named)

    setattr(holder, name, outer)
    more = ("--checkpoint.enable",) if place == "checkpoints" else ()
    return one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *SHORT, *more])


def exit_records_of(tmp_path: Path, ranks: int, place: str, how: Callable[[], None], who: int = 0) -> list[ExitRecord]:
    """What the ranks of a run that does not start leave behind."""
    records = tmp_path / "records"
    records.mkdir()
    with pytest.raises(RankError, match="died with exit code 4"):
        run_ranks(
            *(run_with_delay, ranks, str(tmp_path / "run"), place, how, who),
            backend=None,
            timeout=90,
            environ={RECORDS: str(records)},
        )
    deadline = time.monotonic() + 20
    while len(found := read_records(records / "0")) < ranks and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {record.code for record in found} == {4}
    return found


CASES = [
    ("weights", spins, "weights"),
    pytest.param("rendezvous", sleeps, "rendezvous", marks=pytest.mark.slow),
    pytest.param("data", sleeps, "data", marks=pytest.mark.slow),
    pytest.param("first step", spins, "forward and backward", marks=pytest.mark.slow),
    pytest.param("checkpoints", sleeps, "start", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("place", "how", "phase"), CASES)
def test_one_rank_that_hangs_is_ended_with_phase_and_stack(place: str, how, phase: str, tmp_path: Path) -> None:
    (record,) = exit_records_of(tmp_path, 1, place, how)
    first = record.details.splitlines()[0]
    assert first.startswith("the run has made no progress for ")
    assert first.endswith(f"s: the first step has not ended; rank 0 is in phase '{phase}'")
    assert f"in {how.__name__}" in record.details
    assert "alive, and makes no progress" in record.details
    assert "raise comm.init_timeout_seconds" in record.details
    assert f"in {how.__name__}" in (tmp_path / "run/comm_traces/stack_0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["weights", "data"])
def test_of_two_ranks_the_one_that_hangs_is_named_by_both(place: str, tmp_path: Path) -> None:
    found = exit_records_of(tmp_path, 2, place, spins, who=1)
    assert len({record.details for record in found}) == 1
    assert f"rank 1 is in phase '{place}'" in found[0].details
    assert "in spins" in found[0].details


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("place", "how"), [("data", downloads), ("weights", compiles), ("first step", compiles)])
def test_a_start_that_gets_on_is_left_alone(ranks: int, place: str, how, tmp_path: Path) -> None:
    """For twice as long as nothing may move; the other rank waits for it, but for a collective within a step."""
    if place == "first step" and ranks > 1:
        pytest.skip("a collective within step 1 has its own time limit")
    folder = tmp_path / "run"
    assert run_ranks(run_with_delay, ranks, str(folder), place, how, 0, backend=None, timeout=120) == [0] * ranks
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert not list((folder / "comm_traces").glob("stack_*"))
