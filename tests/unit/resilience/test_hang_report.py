"""Which rank a run waits for, from what the ranks say; and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quadriga.errors import UserError
from quadriga.resilience.hang_report import (
    HangReport,
    Heartbeat,
    hang_fault,
    late_rank,
    moving_ranks,
    rank_on_same_host,
    silent_ranks,
)
from quadriga.resilience.waits import Wait, worst_wait

STACK = """Thread 0x01 [gloo] (most recent call first):
  File "prefetch.py", line 3 in wait
Thread 0x02 [python] (most recent call first):
  File "lanes.py", line 9 in read
  File "loop.py", line 5 in train
"""


def heartbeats(**changes: dict[str, object]) -> dict[int, Heartbeat]:
    """Four ranks on two machines that wait in step 7, but for what is said of one (`rank2={...}`)."""
    usual = {
        rank: Heartbeat(rank, f"host{rank // 2}", 100 + rank, 50, 7, "gradient norm", 8.0, waits=8.0, launched=90)
        for rank in range(4)
    }
    return {rank: replace(heartbeat, **changes.get(f"rank{rank}", {})) for rank, heartbeat in usual.items()}


def hang_report(late: Heartbeat | None, silent: tuple[int, ...] = (), late_waits: bool = False) -> HangReport:
    return HangReport(
        late, silent, heartbeats()[0], "gloo:all_reduce of group 0", 3, late_waits, 4, 8.2, 1e9, same_host_rank=3
    )


def test_a_rank_that_does_not_wait_is_the_late_one() -> None:
    by_rank = heartbeats(rank2={"waits": None, "phase": "data", "seconds": 9.0})
    assert late_rank(by_rank, (), {0, 1, 3}) == by_rank[2]


def test_a_silent_rank_is_late_whatever_its_last_heartbeat() -> None:
    """It may have been stopped within a collective, and others may compute."""
    by_rank = heartbeats(rank1={"waits": None}, rank2={"waits": 0.1})
    assert late_rank(by_rank, (2,), {0, 2, 3}) == by_rank[2]


def test_of_several_the_one_at_the_earliest_step_and_longest_in_its_phase() -> None:
    by_rank = heartbeats(
        rank1={"waits": None, "seconds": 1.0}, rank2={"waits": None, "seconds": 5.0}, rank3={"waits": None}
    )
    by_rank[3] = replace(by_rank[3], step=8, seconds=20.0)
    assert late_rank(by_rank, (), {0}) == by_rank[2]


def test_where_all_wait_the_one_that_has_launched_the_fewest() -> None:
    by_rank = heartbeats(rank3={"launched": 89})
    assert late_rank(by_rank, (), {0, 1, 2, 3}) == by_rank[3]


def test_a_rank_that_has_left_is_neither_silent_nor_late() -> None:
    by_rank = heartbeats(rank0={"finished": True, "waits": None}, rank2={"waits": None})
    before = {
        rank: replace(heartbeat, count=heartbeat.count - (rank not in (0, 3))) for rank, heartbeat in by_rank.items()
    }
    assert silent_ranks(before, by_rank) == (3,)
    assert late_rank(by_rank, (), {1, 3}) == by_rank[2]


def test_a_silent_rank_moves_until_its_standstill_and_silence_exceed_the_limit() -> None:
    """It may be in a call that lets no other thread run, of which its last word cannot tell."""
    no_progress = {f"rank{rank}": {"no_progress": 300.0} for rank in range(4)}
    no_progress["rank2"] = {"no_progress": 30.0}
    for seconds, moving in ((20.0, (2,)), (180.0, (2,)), (181.0, ())):
        by_rank = heartbeats(**{**no_progress, "rank1": {"no_progress": 300.0, "next_silent": seconds}})
        assert moving_ranks(by_rank, (2,), 210.0) == moving
    assert moving_ranks(heartbeats(**no_progress), (), 210.0) == (2,)


def test_of_ranks_that_fell_silent_in_a_row_the_silences_add_up() -> None:
    """Rank 0 saw rank 1 stop 100 s ago, and rank 1 by then had not heard of rank 2 for 120 s; the ring closes."""
    no_progress = {f"rank{rank}": {"no_progress": 0.0} for rank in range(4)}
    by_rank = heartbeats(
        **no_progress
        | {"rank0": {"no_progress": 300.0, "next_silent": 100.0}, "rank1": {"no_progress": 0.0, "next_silent": 120.0}}
    )
    assert moving_ranks(by_rank, (1, 2), 210.0) == (1, 3)
    by_rank = heartbeats(
        **no_progress
        | {"rank3": {"no_progress": 300.0, "next_silent": 100.0}, "rank0": {"no_progress": 0.0, "next_silent": 120.0}}
    )
    assert moving_ranks(by_rank, (0, 1), 210.0) == (0, 2)


def test_a_rank_that_has_just_done_its_first_step_moves_and_one_without_a_heartbeat_does_not_for_ever() -> None:
    by_rank = heartbeats(**{f"rank{rank}": {"no_progress": 300.0, "next_silent": 211.0} for rank in range(4)})
    assert moving_ranks({**by_rank, 1: Heartbeat(1, "?", 0)}, (1,), 210.0) == ()
    assert moving_ranks({**by_rank, 1: replace(by_rank[1], no_progress=None)}, (), 210.0) == (1,)
    assert moving_ranks({**by_rank, 1: replace(by_rank[1], no_progress=None, finished=True)}, (), 210.0) == ()


def test_help_comes_from_the_same_machine() -> None:
    by_rank = heartbeats()
    assert rank_on_same_host(by_rank[2], by_rank, (2,)) == 3
    assert rank_on_same_host(by_rank[3], by_rank, (3,)) == 2
    assert rank_on_same_host(by_rank[2], by_rank, (2, 3)) is None


def test_the_report_names_everything(tmp_path: object) -> None:
    late = heartbeats(rank2={"phase": "data", "seconds": 9.0})[2]
    report = str(hang_fault(hang_report(late), STACK, "/run/comm_traces"))
    assert report.splitlines()[0] == "the run has made no progress for 8 s: it waits for rank 2"
    for fact in (
        "process 102 on host1",
        "step 7, phase 'data', for 9 s",
        "alive, and does not wait for others",
        "3 of 4 ranks; rank 0 (step 7, gradient norm) in gloo:all_reduce of group 0",
        "/run/comm_traces",
        'File "lanes.py", line 9 in read',
        "comm.train_timeout_seconds",
    ):
        assert fact in report
    assert "prefetch.py" not in report
    assert hang_fault(hang_report(late), STACK, "").exit_code == 4


def test_a_machine_that_is_gone_is_named() -> None:
    report = str(hang_fault(hang_report(heartbeats()[2], silent=(2, 3)), "", "/run"))
    assert "(ranks 2, 3 are silent)" in report
    assert "its machine is gone" in report
    assert "If it happens on host1 again" in report
    assert "the rendezvous store does not answer" in str(hang_fault(hang_report(None), "", "/run"))


def test_an_alarm_survives_the_store() -> None:
    for late in (heartbeats()[1], None):
        report = hang_report(late, silent=(1,))
        assert HangReport.from_json(report.to_json().encode()) == report
    assert Heartbeat.from_json(heartbeats()[3].to_json().encode()) == heartbeats()[3]


@pytest.mark.parametrize(
    "change",
    [
        *({"rank": value} for value in ("1", 1.0, True, None, [1], 10**300)),
        *({"seconds": value} for value in ("1", None, 10**300, False)),
        *({"host": value} for value in (None, 3, ["a"])),
        {"finished": 1},
        {"more": 1},
        {"phase": "x" * 5000},
    ],
    ids=str,
)
def test_what_is_no_heartbeat_is_refused(change: dict[str, object]) -> None:
    """Anybody who reaches the store can write there."""
    text = json.dumps(json.loads(heartbeats()[0].to_json()) | change).encode()
    with pytest.raises(UserError):
        Heartbeat.from_json(text)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 3000, b'{"rank": NaN}', b"\x80\x04N."])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    for kind in (Heartbeat, HangReport):
        with pytest.raises(UserError):
            kind.from_json(text)


@pytest.mark.parametrize(
    "change",
    [{"silent": ["1"]}, {"silent": 3}, {"late": 3}, {"late": {}}, {"reporter": None}, {"same_host_rank": "0"}],
    ids=str,
)
def test_what_is_no_hang_report_is_refused(change: dict[str, object]) -> None:
    text = json.dumps(json.loads(hang_report(heartbeats()[1]).to_json()) | change).encode()
    with pytest.raises(UserError):
        HangReport.from_json(text)


def test_texts_from_the_store_reach_the_terminal_without_control_characters() -> None:
    report_of_hang = hang_report(replace(heartbeats()[1], host="a\x1b[2Jb", phase="c\rd"))
    report = str(hang_fault(HangReport.from_json(report_of_hang.to_json().encode()), "loop.py \x1b]0;x\x07", "/run"))
    assert "a\\x1b[2Jb" in report
    assert all(line.isprintable() for line in report.splitlines())


def test_the_wait_to_report_is_one_that_is_too_long_and_then_one_of_training() -> None:
    """A request that is agreed upon beside a step waits as long as the step itself does, and explains nothing."""
    message, request, none = Wait(6.1, "a message", 5.6), Wait(6.4, "a request", 5.6, host=True), Wait(0, "", 5.6)
    assert worst_wait([message, request], none) == message
    assert worst_wait([message._replace(seconds=3.0), request], none) == request
    assert worst_wait([message._replace(seconds=3.0), request._replace(seconds=4.0)], none).operation == "a message"
    assert worst_wait([], none) == none
