"""Which rank a run waits for, from what the ranks say; and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quadriga.errors import UserError
from quadriga.resilience.hang_report import Beat, Stall, fault, helper_of, late_rank, moving_ranks, silent_ranks
from quadriga.resilience.waits import Wait, worst

STACK = """Thread 0x01 [gloo] (most recent call first):
  File "prefetch.py", line 3 in wait
Thread 0x02 [python] (most recent call first):
  File "lanes.py", line 9 in read
  File "loop.py", line 5 in train
"""


def beats(**changes: dict[str, object]) -> dict[int, Beat]:
    """Four ranks on two machines that wait in step 7, but for what is said of one (`rank2={...}`)."""
    usual = {
        rank: Beat(rank, f"host{rank // 2}", 100 + rank, 50, 7, "gradient norm", 8.0, waits=8.0, launched=90)
        for rank in range(4)
    }
    return {rank: replace(beat, **changes.get(f"rank{rank}", {})) for rank, beat in usual.items()}


def stall(late: Beat | None, silent: tuple[int, ...] = (), late_waits: bool = False) -> Stall:
    return Stall(late, silent, beats()[0], "gloo:all_reduce of group 0", 3, late_waits, 4, 8.2, 1e9, helper=3)


def test_a_rank_that_does_not_wait_is_the_late_one() -> None:
    told = beats(rank2={"waits": None, "phase": "data", "seconds": 9.0})
    assert late_rank(told, (), {0, 1, 3}) == told[2]


def test_a_silent_rank_is_late_whatever_it_said_last() -> None:
    """It may have been stopped within a collective, and others may compute."""
    told = beats(rank1={"waits": None}, rank2={"waits": 0.1})
    assert late_rank(told, (2,), {0, 2, 3}) == told[2]


def test_of_several_the_one_at_the_earliest_step_and_longest_in_its_phase() -> None:
    told = beats(rank1={"waits": None, "seconds": 1.0}, rank2={"waits": None, "seconds": 5.0}, rank3={"waits": None})
    told[3] = replace(told[3], step=8, seconds=20.0)
    assert late_rank(told, (), {0}) == told[2]


def test_where_all_wait_the_one_that_has_launched_the_fewest() -> None:
    told = beats(rank3={"launched": 89})
    assert late_rank(told, (), {0, 1, 2, 3}) == told[3]


def test_a_rank_that_has_left_is_neither_silent_nor_late() -> None:
    told = beats(rank0={"left": True, "waits": None}, rank2={"waits": None})
    before = {rank: replace(beat, count=beat.count - (rank not in (0, 3))) for rank, beat in told.items()}
    assert silent_ranks(before, told) == (3,)
    assert late_rank(told, (), {1, 3}) == told[2]


def test_a_silent_rank_moves_until_its_standstill_and_silence_exceed_the_limit() -> None:
    """It may be in a call that lets no other thread run, of which its last word cannot tell."""
    still = {f"rank{rank}": {"still": 300.0} for rank in range(4)}
    still["rank2"] = {"still": 30.0}
    for seconds, moving in ((20.0, (2,)), (180.0, (2,)), (181.0, ())):
        told = beats(**{**still, "rank1": {"still": 300.0, "next_silent": seconds}})
        assert moving_ranks(told, (2,), 210.0) == moving
    assert moving_ranks(beats(**still), (), 210.0) == (2,)


def test_of_ranks_that_fell_silent_in_a_row_the_silences_add_up() -> None:
    """Rank 0 saw rank 1 stop 100 s ago, and rank 1 by then had not heard of rank 2 for 120 s; the ring closes."""
    still = {f"rank{rank}": {"still": 0.0} for rank in range(4)}
    told = beats(
        **still | {"rank0": {"still": 300.0, "next_silent": 100.0}, "rank1": {"still": 0.0, "next_silent": 120.0}}
    )
    assert moving_ranks(told, (1, 2), 210.0) == (1, 3)
    told = beats(
        **still | {"rank3": {"still": 300.0, "next_silent": 100.0}, "rank0": {"still": 0.0, "next_silent": 120.0}}
    )
    assert moving_ranks(told, (0, 1), 210.0) == (0, 2)


def test_a_rank_that_has_just_done_its_first_step_moves_and_one_never_heard_of_does_not_for_ever() -> None:
    told = beats(**{f"rank{rank}": {"still": 300.0, "next_silent": 211.0} for rank in range(4)})
    assert moving_ranks({**told, 1: Beat(1, "?", 0)}, (1,), 210.0) == ()
    assert moving_ranks({**told, 1: replace(told[1], still=None)}, (), 210.0) == (1,)
    assert moving_ranks({**told, 1: replace(told[1], still=None, left=True)}, (), 210.0) == ()


def test_help_comes_from_the_same_machine() -> None:
    told = beats()
    assert helper_of(told[2], told, (2,)) == 3
    assert helper_of(told[3], told, (3,)) == 2
    assert helper_of(told[2], told, (2, 3)) is None


def test_the_report_names_everything(tmp_path: object) -> None:
    late = beats(rank2={"phase": "data", "seconds": 9.0})[2]
    report = str(fault(stall(late), STACK, "/run/comm_traces"))
    assert report.splitlines()[0] == "the run has stood still for 8 s: it waits for rank 2"
    for fact in (
        "process 102 on host1",
        "step 7, phase 'data', for 9 s",
        "alive, and not on its way to the others",
        "3 of 4 ranks; rank 0 (step 7, gradient norm) in gloo:all_reduce of group 0",
        "/run/comm_traces",
        'File "lanes.py", line 9 in read',
        "comm.train_timeout_seconds",
    ):
        assert fact in report
    assert "prefetch.py" not in report
    assert fault(stall(late), STACK, "").exit_code == 4


def test_a_machine_that_is_gone_is_named() -> None:
    report = str(fault(stall(beats()[2], silent=(2, 3)), "", "/run"))
    assert "(ranks 2, 3 are silent)" in report
    assert "its machine is gone" in report
    assert "If it happens on host1 again" in report
    assert "the rendezvous store does not answer" in str(fault(stall(None), "", "/run"))


def test_an_alarm_survives_the_store() -> None:
    for late in (beats()[1], None):
        said = stall(late, silent=(1,))
        assert Stall.from_json(said.to_json().encode()) == said
    assert Beat.from_json(beats()[3].to_json().encode()) == beats()[3]


@pytest.mark.parametrize(
    "change",
    [
        *({"rank": value} for value in ("1", 1.0, True, None, [1], 10**300)),
        *({"seconds": value} for value in ("1", None, 10**300, False)),
        *({"host": value} for value in (None, 3, ["a"])),
        {"left": 1},
        {"more": 1},
        {"phase": "x" * 5000},
    ],
    ids=str,
)
def test_what_is_no_beat_is_refused(change: dict[str, object]) -> None:
    """Anybody who reaches the store can write there."""
    text = json.dumps(json.loads(beats()[0].to_json()) | change).encode()
    with pytest.raises(UserError):
        Beat.from_json(text)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 3000, b'{"rank": NaN}', b"\x80\x04N."])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    for kind in (Beat, Stall):
        with pytest.raises(UserError):
            kind.from_json(text)


@pytest.mark.parametrize(
    "change", [{"silent": ["1"]}, {"silent": 3}, {"late": 3}, {"late": {}}, {"accuser": None}, {"helper": "0"}], ids=str
)
def test_what_is_no_alarm_is_refused(change: dict[str, object]) -> None:
    text = json.dumps(json.loads(stall(beats()[1]).to_json()) | change).encode()
    with pytest.raises(UserError):
        Stall.from_json(text)


def test_texts_from_the_store_reach_the_terminal_without_control_characters() -> None:
    said = stall(replace(beats()[1], host="a\x1b[2Jb", phase="c\rd"))
    report = str(fault(Stall.from_json(said.to_json().encode()), "loop.py \x1b]0;x\x07", "/run"))
    assert "a\\x1b[2Jb" in report
    assert all(line.isprintable() for line in report.splitlines())


def test_the_wait_to_report_is_one_that_is_too_long_and_then_one_of_training() -> None:
    """A wish that is agreed upon beside a step waits as long as the step itself does, and explains nothing."""
    message, wish, none = Wait(6.1, "a message", 5.6), Wait(6.4, "a wish", 5.6, host=True), Wait(0, "", 5.6)
    assert worst([message, wish], none) == message
    assert worst([message._replace(seconds=3.0), wish], none) == wish
    assert worst([message._replace(seconds=3.0), wish._replace(seconds=4.0)], none).operation == "a message"
    assert worst([], none) == none
