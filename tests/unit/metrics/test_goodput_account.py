"""The account of a run's time: event logs made by hand with known answers, and simulated runs whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.cli.main import main
from quadriga.metrics.goodput import KINDS, compute_goodput


def event(kind: str, time: float, attempt: int, step: int, **facts) -> dict:
    return {"event": kind, "time": time, "attempt": attempt, "rank": 0, "step": step, **facts}


def record(time: float, attempt: int, step: int, wait: float = 0.0, elapsed: float = 0.0) -> dict:
    facts = {"data_wait": wait, "elapsed_seconds": elapsed}
    return {"kind": "train", "time": time, "attempt": attempt, "step": step, **facts}


def validation(time: float, attempt: int, step: int, seconds: float) -> dict:
    return {"kind": "validation", "time": time, "attempt": attempt, "step": step, "seconds": seconds}


FIRST = [
    event("start", 1008, 1, 0, process_start=1000),
    event("ready", 1020, 1, 0),
    event("save_begin", 1120, 1, 10),
    event("save_end", 1130, 1, 10, seconds=10, blocked_seconds=10),
]
FIRST_RECORDS = [record(1120, 1, 10, 5), record(1230, 1, 20, 2), validation(1240, 1, 20, 10), record(1340, 1, 30, 0)]
SECOND = [
    event("start", 1405, 2, 0, process_start=1400),
    event("ready", 1430, 2, 10),
    event("skip", 1480, 2, 15, reason="spike"),
    event("save_begin", 1530, 2, 20),
    event("save_end", 1540, 2, 20, seconds=10, blocked_seconds=10),
    event("end", 1541, 2, 20, code=0, reason="finished"),
]
SECOND_RECORDS = [record(1530, 2, 20, 1)]


def test_what_a_start_says_of_its_backends_is_no_progress():
    backends = [{"kind": "backends", "time": 1019, "attempt": 1, "step": 1, "backends": {}}]
    backends += [{"kind": "backends", "time": 1429, "attempt": 2, "step": 11, "backends": {}}]
    plain = compute_goodput([*FIRST, *SECOND], [*FIRST_RECORDS, *SECOND_RECORDS])
    assert compute_goodput([*FIRST, *SECOND], [backends[0], *FIRST_RECORDS, backends[1], *SECOND_RECORDS]) == plain


def test_a_killed_run_that_went_on_from_a_save():
    found = compute_goodput([*FIRST, *SECOND], [*FIRST_RECORDS, *SECOND_RECORDS])
    assert found.seconds == {
        "trained": 95 + 100,  # up to step 10, without waiting and saving; then from 10 to 20
        "data_wait": 5 + 1,
        "validated": 0,  # at step 20, which was trained again
        "saved": 10 + 10,
        "started": 20 + 30,
        "lost": 1340 - 1130,
        "down": 1400 - 1340,
    }
    assert found.wall_seconds == 541
    assert (found.replayed_steps, found.skipped_steps, found.saves) == (20, 1, 2)
    first, second = found.attempts
    assert (first.first_step, first.kept_step, first.last_step, first.ended) == (0, 10, 30, "killed without an event")
    assert (second.first_step, second.kept_step, second.last_step, second.ended) == (10, 20, 20, "finished")


def test_a_run_that_goes_on_has_lost_nothing_yet():
    found = compute_goodput(FIRST, FIRST_RECORDS)
    trained = (1340 - 1020) - 7 - 10 - 10
    expected = {"trained": trained, "data_wait": 7, "validated": 10, "saved": 10, "started": 20, "lost": 0, "down": 0}
    assert found.seconds == expected
    assert found.attempts[0].ended == "no event since: it is running, or was killed"


def test_between_two_lines_time_is_divided_by_steps():
    """A start that goes on from step 24, of which nothing but the lines at 20 and 30 tells."""
    second = [event("start", 1400, 2, 0, process_start=1400), event("ready", 1410, 2, 24)]
    found = compute_goodput([*FIRST, *second], FIRST_RECORDS)
    passed = 1240 + 0.4 * (1340 - 1240)
    assert found.seconds["lost"] == pytest.approx(1340 - passed)
    assert found.seconds["trained"] == pytest.approx(passed - 1020 - 7 - 10 - 10)
    assert found.replayed_steps == 6


def test_starts_that_never_came_to_a_step_and_one_that_went_back_further():
    """A second start fails while it loads; the third finds the save damaged and goes back to the beginning."""
    second = [event("start", 1404, 2, 0, process_start=1400), event("fault", 1450, 2, 0, error="no disk")]
    third = [event("start", 1500, 3, 0, process_start=1490), event("ready", 1510, 3, 0)]
    found = compute_goodput([*FIRST, *second, *third], [*FIRST_RECORDS, record(1610, 3, 10, 0)])
    expected = {"trained": 100, "data_wait": 0, "validated": 0, "saved": 0}
    expected |= {"started": 20 + 50 + 20, "lost": 1340 - 1020, "down": 60 + 40}
    assert found.seconds == expected
    assert found.attempts[1].ended == "rank 0: no disk"
    assert found.attempts[1].ready is None
    assert found.as_json()["faults"] == 1


def test_what_a_save_beside_training_costs_is_what_it_kept_waiting():
    events = [
        event("start", 0, 1, 0, process_start=0),
        event("ready", 0, 1, 0),
        event("save_begin", 10, 1, 10),
        event("save_end", 40, 1, 10, seconds=30, blocked_seconds=2),
        event("save_begin", 50, 1, 50),  # at the end nothing trains beside it
        event("save_end", 57, 1, 50, seconds=7, blocked_seconds=1),
    ]
    found = compute_goodput(events, [record(step, 1, step) for step in (10, 20, 30, 50)])
    assert found.seconds["saved"] == 2 + 7
    torn = compute_goodput(events[:3], [record(10, 1, 10), validation(15, 1, 10, 1)])
    assert torn.seconds["saved"] == 5  # killed in the save


def test_the_first_rank_to_fail_is_reported_and_not_those_that_lost_it():
    faults = [
        event("fault", 1350, 1, 30, error="Connection closed by peer", lost_peer=True),
        event("fault", 1351, 1, 30, error="out of memory") | {"rank": 3},
    ]
    assert compute_goodput([*FIRST, *faults], FIRST_RECORDS).attempts[0].ended == "rank 3: out of memory"


def test_runs_without_an_event_log_are_accounted_from_their_metrics():
    records = [record(100, 1, 1, 1, elapsed=10), record(190, 1, 10, 2, elapsed=100), record(300, 2, 6, 0, elapsed=10)]
    found = compute_goodput([], records)
    assert found.seconds == {
        "trained": 10 + 90 * 4 / 9 - 1 - 2 * 4 / 9 + 10,
        "data_wait": 1 + 2 * 4 / 9,
        "validated": 0,
        "saved": 0,
        "started": 0,
        "lost": pytest.approx(90 * 5 / 9),
        "down": 100,
    }
    assert compute_goodput([], []) is None


def test_the_pause_after_a_finished_run_is_no_downtime():
    """Finished at 1541; three days later it was extended: a start that crashed before it trained, and one that did."""
    days = 3 * 86400
    third = [event("start", 1600 + days, 3, 0, process_start=1541 + days), event("fault", 1620 + days, 3, 0)]
    fourth = [event("start", 1650 + days, 4, 0, process_start=1640 + days), event("ready", 1660 + days, 4, 20)]
    fourth += [event("end", 1760 + days, 4, 30, code=0, reason="finished")]
    before = compute_goodput([*FIRST, *SECOND], [*FIRST_RECORDS, *SECOND_RECORDS])
    records = [*FIRST_RECORDS, *SECOND_RECORDS, record(1760 + days, 4, 30)]
    found = compute_goodput([*FIRST, *SECOND, *third, *fourth], records)
    assert found.idle_seconds == days
    assert found.seconds == before.seconds | {
        "trained": before.seconds["trained"] + 100,
        "started": before.seconds["started"] + (1620 - 1541) + 20,
        "down": before.seconds["down"] + 20,
    }
    assert found.wall_seconds == 760 == sum(found.seconds.values())
    assert found.as_json()["effective"] == pytest.approx(295 / 760)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_start_that_was_asked_to_leave_leaves_the_run_down():
    asked = event("end", 1541, 2, 20, code=75, reason="asked to leave")
    third = [event("start", 1641, 3, 20, process_start=1641)]
    found = compute_goodput([*FIRST, *SECOND[:-1], asked, *third], [*FIRST_RECORDS, *SECOND_RECORDS])
    assert (found.seconds["down"], found.idle_seconds) == (60 + 100, 0)


@dataclass
class Simulated:
    """A run that is logged at every step; it knows of each second what it was."""

    clock: float = 0.0
    saved: int = 0
    spent: list[tuple[str, int, float]] = field(default_factory=list)  # kind, the step under way, seconds
    events: list[dict] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)

    def spend(self, kind: str, seconds: float, step: int = 0) -> None:
        self.clock += seconds
        self.spent.append((kind, step, seconds))

    def start(self, attempt: int, down: float, loading: float, steps: int, step_seconds: float, interval: int) -> None:
        if attempt > 1:
            self.spend("down", down)
        began = self.clock
        self.spent = [("lost" if step > self.saved else kind, step, seconds) for kind, step, seconds in self.spent]
        self.spend("started", loading)
        self.events.append(event("start", self.clock, attempt, 0, process_start=began))
        self.events.append(event("ready", self.clock, attempt, self.saved))
        for step in range(self.saved + 1, self.saved + steps + 1):
            self.spend("data_wait", 0.25 * step_seconds, step)
            self.spend("trained", step_seconds, step)
            self.records.append(record(self.clock, attempt, step, 0.25 * step_seconds))
            if step % 3 == 0:
                self.spend("validated", 0.5, step)
                self.records.append(validation(self.clock, attempt, step, 0.5))
            if step % interval == 0:
                self.events.append(event("save_begin", self.clock, attempt, step))
                self.spend("saved", 0.75, step)
                self.events.append(event("save_end", self.clock, attempt, step, seconds=0.75, blocked_seconds=0.75))
                self.saved = step

    def truth(self) -> dict[str, float]:
        return {kind: sum(seconds for other, _, seconds in self.spent if other == kind) for kind in KINDS}


SECONDS = st.floats(0.01, 1000)
STARTS = st.lists(st.tuples(SECONDS, SECONDS, st.integers(0, 20), SECONDS, st.integers(1, 9)), min_size=1, max_size=6)


@given(starts=STARTS)
def test_of_any_run_every_second_is_counted_once_and_as_what_it_was(starts):
    run = Simulated()
    for attempt, (down, loading, steps, step_seconds, interval) in enumerate(starts, start=1):
        run.start(attempt, down, loading, steps, step_seconds, interval)
    found = compute_goodput(run.events, run.records)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.seconds == pytest.approx(run.truth(), rel=1e-9, abs=1e-6)
    assert found.wall_seconds == pytest.approx(run.clock, rel=1e-9, abs=1e-6)


LINES = st.lists(
    st.tuples(
        st.sampled_from(["start", "ready", "save_begin", "save_end", "skip", "fault", "end", "train", "validation"]),
        st.integers(1, 4),
        st.floats(0, 1e6),
        st.integers(0, 30),
        st.floats(0, 1e5),
    ),
    min_size=1,
)


@given(lines=LINES)
def test_whatever_the_clocks_say_shares_are_shares(lines):
    events, records = [], []
    for kind, attempt, time, step, seconds in lines:
        if kind == "train":
            records.append(record(time, attempt, step, seconds, seconds))
        elif kind == "validation":
            records.append(validation(time, attempt, step, seconds))
        else:
            facts = {"process_start": time - seconds} if kind == "start" else {}
            events.append(event(kind, time, attempt, step, **facts, blocked_seconds=seconds))
    found = compute_goodput(sorted(events, key=lambda one: one["time"]), records)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds, rel=1e-9, abs=1e-6)
    assert not any(math.isnan(share) for share in found.shares.values())


def test_the_table_and_the_json(tmp_path, capsys):
    lines = "".join(json.dumps(one) + "\n" for one in [*FIRST, *SECOND])
    (tmp_path / "events.jsonl").write_text(lines + '{"event": "torn')
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in [*FIRST_RECORDS, *SECOND_RECORDS])
    )
    assert main(["goodput", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "step 20 after 2 starts, 0 faults, 2 saves"
    assert any(line.split()[:3] == ["trained", "3m15s", "36.0%"] for line in table)
    assert table[-1] == f"notice: {tmp_path}/events.jsonl: the last line is incomplete, as after a kill, and left out"
    assert any("20 steps that a later start trained again" in line for line in table)
    assert any("1 of them bad and skipped" in line for line in table)
    assert any("killed without an event (20 steps lost)" in line for line in table)
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["effective"] == pytest.approx(195 / 541)
    assert sum(output["shares"].values()) == pytest.approx(1)
    assert [attempt["kept_step"] for attempt in output["attempts"]] == [10, 20]


def test_lines_that_are_no_records_are_reported_and_the_others_count(tmp_path, capsys):
    bad = [{"event": "end"}, {"event": "start", "time": "now", "attempt": 1, "rank": 0, "step": 0}]
    lines = [*FIRST, *bad, *SECOND, {"event": "\x1b[2J", "time": 1541, "attempt": 2, "rank": 0, "step": 20}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    records = [
        *FIRST_RECORDS,
        {key: FIRST_RECORDS[0][key] for key in FIRST_RECORDS[0] if key != "data_wait"},
        {**FIRST_RECORDS[0], "step": -1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*records, *SECOND_RECORDS]))
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["effective"] == pytest.approx(195 / 541)
    of_metrics, of_events = output["notices"]
    assert "metrics.jsonl: 2 lines are no records" in of_metrics
    assert "line 5: it lacks data_wait" in of_metrics
    assert "line 6: step is -1" in of_metrics
    assert "line 5: it lacks attempt, rank, step, time" in of_events
    assert "line 6: time is 'now', not a time" in of_events


def test_records_of_an_unknown_kind_that_lack_a_time_change_nothing(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*FIRST, *SECOND]))
    records = [*FIRST_RECORDS, {"kind": "validition", "attempt": 1, "step": 2}, *SECOND_RECORDS]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effective"] == pytest.approx(195 / 541)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_logs_that_hold_no_record_are_named(tmp_path, capsys, name):
    (tmp_path / name).write_text("[" * 100_000 + "\n" + "x" * 1000 + "\n{}\n")
    assert main(["goodput", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert f"{tmp_path / name}: 3 lines are no records of a run" in output
    assert len(output) < 1500
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    assert main(["goodput", str(tmp_path)]) == 2
    assert f"{tmp_path / name}" in capsys.readouterr().err


def test_the_text_of_an_error_cannot_move_the_cursor(tmp_path, capsys):
    fault = event("fault", 1350, 1, 30, error="\x1b[2Jgone\nstep 9 after 1 start " + "x" * 5000)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*FIRST, fault]))
    assert main(["goodput", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Jgone\\nstep 9" in out
    assert len(out) < 4000
    assert "\x1b" not in out


def test_a_folder_without_a_run_is_reported(tmp_path, capsys):
    assert main(["goodput", str(tmp_path)]) == 2
    assert "the folder has no records of a run" in capsys.readouterr().err
    assert main(["goodput", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def shares_of(events, records=()):
    found = compute_goodput(sorted(events, key=lambda each: each["time"]), list(records))
    return found, " ".join(found.notices)


def a_run(begins: float, steps: int = 100) -> tuple[list[dict], list[dict]]:
    """A finished run of 1,000 s, as the only start of its folder."""
    events = [
        event("start", begins + 8, 1, 0, process_start=begins),
        event("ready", begins + 20, 1, 0),
        event("end", begins + 1000, 1, steps, code=0),
    ]
    return events, [record(begins + 500, 1, steps // 2, 4), record(begins + 1000, 1, steps, 6)]


def test_two_runs_in_one_folder_are_two_starts_and_told():
    (first, its_records), (second, other_records) = a_run(1000), a_run(9000)
    found, told = shares_of(first + second, its_records + other_records)
    assert told == "several starts have the number 1: these are files of several runs"
    assert [attempt.began for attempt in found.attempts] == [1000, 9000]
    assert found.idle_seconds == 7000  # and not trained
    assert found.seconds["trained"] == 970
    assert found.seconds["lost"] == 980


def test_records_of_another_run_than_the_events_are_told():
    events, _ = a_run(1000)
    assert "start 1 has lines from after its end" in shares_of(events, a_run(900_000)[1])[1]
    assert "start 1 has lines from before its beginning" in shares_of(events, a_run(100)[1][:1])[1]
    assert shares_of(*a_run(1000))[1] == ""


def test_records_that_repeat_or_go_back_count_once():
    events, records = a_run(1000)
    doubled = [records[0], records[0], record(1600, 1, 20, 300), *records[1:]]
    assert shares_of(events, doubled)[0].seconds["data_wait"] == 10


def test_starts_in_the_wrong_order_are_told():
    later = [event("start", 500, 2, 0, process_start=490), event("ready", 510, 2, 100), event("end", 520, 2, 101)]
    assert "start 2 began before start 1" in shares_of(a_run(1000)[0] + later)[1]
