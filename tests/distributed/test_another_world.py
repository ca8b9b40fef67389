"""One run that moves: from layout to layout and from world to world, it reads what the straight run reads."""

from __future__ import annotations

import pytest
from training import TINY, largest_difference, train

from quadriga.metrics.documents import read_documents
from quadriga.metrics.jsonl import read_metrics
from quadriga.rehearsal.equivalence.rows import TOLERANCES

LEG = 3  # steps
LEGS = 4
MODEL = (*TINY, "--checkpoint.enable", f"--lr_scheduler.total_steps={LEG * LEGS}", "--metrics.log_documents")
TP, PP, CP = (f"--parallelism.{axis}_parallel_degree=2" for axis in ("tensor", "pipeline", "context"))
TWO_ROWS = "--training.local_batch_size=2"
Leg = tuple[int, tuple[str, ...]]

JOURNEYS: dict[str, tuple[Leg, ...]] = {
    "FSDP 4, TP 2 x PP 2, 1, FSDP 2 x CP 2": ((4, ()), (4, (TP, PP, TWO_ROWS)), (1, ()), (4, (CP,))),
}
LONG_JOURNEYS: dict[str, tuple[Leg, ...]] = {
    "4, 2, 8, 4 ranks": ((4, ()), (2, ()), (8, ()), (4, ())),
    "TP 2, PP 2, CP 2, FSDP 8": ((2, (TP,)), (2, (PP, TWO_ROWS)), (2, (CP,)), (8, ())),
    "TP x PP x CP, DDP 2, FSDP x TP, 1": (
        (8, (TP, PP, CP, TWO_ROWS)),
        (2, ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1")),
        (4, (TP,)),
        (1, ()),
    ),
}


def journey(folder, legs: tuple[Leg, ...]) -> None:
    straight = train(folder / "straight", 1, *MODEL, f"--training.steps={LEG * LEGS}")
    for number, (ranks, keys) in enumerate(legs, start=1):
        model = [one for one in MODEL if one.partition("=")[0] not in {key.partition("=")[0] for key in keys}]
        train(folder / "moved", ranks, *model, *keys, f"--training.steps={LEG * number}")
    moved = read_metrics(folder / "moved" / "metrics.jsonl")
    assert [record["attempt"] for record in moved] == [1 + step // LEG for step in range(LEG * LEGS)]
    assert [record["tokens_seen"] for record in moved] == [record["tokens_seen"] for record in straight]
    assert read_documents(folder / "moved") == read_documents(folder / "straight"), "none twice, none lost"
    assert len(read_documents(folder / "moved")) == LEG * LEGS
    assert largest_difference(moved, straight, "loss") <= TOLERANCES["float32"]["loss"]


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_run_that_moves_is_the_straight_run(name, tmp_path):
    journey(tmp_path, JOURNEYS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_JOURNEYS)
def test_a_run_that_moves_further(name, tmp_path):
    journey(tmp_path, LONG_JOURNEYS[name])
