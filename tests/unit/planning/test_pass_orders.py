"""The orders of pipeline schedules: those that torch works out, for any number of ranks, stages and micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action, get_schedule_class

from quadriga.config.rules_pipeline import SPLIT_BACKWARD
from quadriga.planning.schedule import order_of

INTERLEAVED = ("Interleaved1F1B", "InterleavedZeroBubble")


def of_torch(schedule: str, rank: int, ranks: int, stages: int, micro_batches: int) -> list[str]:
    """What torch's own arithmetic gives for one rank; it looks at nothing but these numbers."""
    rounds = max(1, micro_batches // ranks)
    numbers = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=stages,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // rounds,
        num_stages=ranks * stages,
        _stages=range(stages),
    )
    actions = get_schedule_class(schedule)._calculate_single_rank_operations(numbers, rank)
    return [shown for action in actions if action is not None for shown in parts(action)]


def parts(action: _Action) -> list[str]:
    return [str(each) for each in action.sub_actions] if action.sub_actions else [str(action)]


@given(
    schedule=st.sampled_from([*INTERLEAVED, "ZBVZeroBubble", "DualPipeV", "LoopedBFS"]),
    ranks=st.integers(1, 9),
    stages=st.integers(2, 4),
    micro_batches=st.integers(1, 40),
)
def test_orders_are_those_of_torch(schedule: str, ranks: int, stages: int, micro_batches: int) -> None:
    if schedule in INTERLEAVED and micro_batches % max(1, micro_batches // ranks):
        micro_batches *= ranks  # others are refused
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        stages = 2
    if schedule == "DualPipeV":
        micro_batches += 2 * ranks
    order = order_of(schedule, ranks, stages, micro_batches)
    for rank, actions in enumerate(order.ranks):
        assert [str(action) for action in actions] == of_torch(schedule, rank, ranks, stages, micro_batches)
    assert order.deadlock == ()


def test_those_that_split_the_backward_pass_are_those_that_the_configuration_check_knows() -> None:
    stages = {"GPipe": 1, "1F1B": 1}
    every = (*stages, *INTERLEAVED, "LoopedBFS", "ZBVZeroBubble", "DualPipeV")
    split = {name for name in every if order_of(name, 2, stages.get(name, 2), 8).splits_backward}
    assert split == set(SPLIT_BACKWARD)


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "micro_batches", "at_once", "idle"),
    [
        ("GPipe", 4, 1, 8, (8, 8, 8, 8), 3 / 8),  # (ranks - 1) / micro-batches: arXiv 1811.06965
        ("1F1B", 4, 1, 8, (4, 3, 2, 1), 3 / 8),
        ("1F1B", 4, 1, 2, (2, 2, 2, 1), 3 / 2),
        ("Interleaved1F1B", 4, 2, 8, (11, 9, 7, 5), 3 / 16),  # divided by the stages of a rank: arXiv 2104.04473
        ("ZBVZeroBubble", 4, 2, 8, (8, 8, 8, 8), 0.0),
    ],
)
def test_what_the_papers_say_of_them(
    schedule: str, ranks: int, stages: int, micro_batches: int, at_once: tuple[int, ...], idle: float
) -> None:
    order = order_of(schedule, ranks, stages, micro_batches)
    times = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    seconds = {(stage, kind): time for stage in range(ranks * stages) for kind, time in times.items()}
    assert order.in_flight == at_once
    assert order.idle_shares(seconds) == pytest.approx([idle] * ranks, abs=0.2 if idle == 0.0 else 1e-9)
