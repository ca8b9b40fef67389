"""The rounds of the watch before the first step has ended, by a clock that the test moves: no process, no sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from quadriga.config.schema import Comm
from quadriga.resilience import activity, waits, watchdog
from quadriga.resilience.hang_report import HangReport, Heartbeat
from quadriga.resilience.progress import Progress
from quadriga.resilience.watchdog import Watchdog

PAUSE, LIMIT = 5.0, 210.0  # of comm.init_timeout_seconds = 300


class ProcessEnded(Exception):
    """Instead of the end of the process."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 2000, "the watch goes on for ever"


class Round:
    """The event that a round waits for: the wait moves the clock."""

    def __init__(self, clock: Clock, stop_at: float, stopped: Callable[[], None]) -> None:
        self._clock, self._stop_at, self._stopped = clock, stop_at, stopped

    def wait(self, seconds: float) -> None:
        self._clock.sleep(seconds)
        if self._clock.now >= self._stop_at:
            self._stopped()

    def clear(self) -> None:
        pass


class Store:
    """A store in which `other` says what rank 0 would; `fails`: whether it does not answer now."""

    def __init__(self, clock: Clock, other: Callable[[float], Heartbeat], fails: Callable[[float], bool]) -> None:
        self._clock, self._other, self._fails, self._held = clock, other, fails, dict[str, bytes]()

    def _ask(self) -> None:
        if self._fails(self._clock.now):
            self._clock.sleep(20.0)  # its time limit
            raise RuntimeError("no answer")
        self._held["0"] = self._other(self._clock.now).to_json().encode()

    def set(self, key: str, value: str) -> None:
        self._ask()
        self._held[key] = value.encode()

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        self._ask()
        if self._held.get(key, b"").decode() == expected:
            self._held[key] = wanted.encode()
        return self._held[key]

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self._held for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._ask()
        return [self._held[key] for key in keys]


def ended(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    other: Callable[[float], Heartbeat],
    fails: Callable[[float], bool] = lambda now: False,
    until: float = 1500.0,
) -> tuple[float, HangReport] | None:
    """When, and how, rank 1 ends the run, in which it waits from the beginning; None: not before `until`."""
    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep, time=lambda: clock.now)
    for module in (watchdog, activity, waits):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(activity.ActivityMonitor, "_progress_signs", lambda self: iter([False]))
    environ = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    watch = Watchdog(Comm(), 300.0, Progress(), str(folder), environ)
    watch._in_barrier = True
    watch._next_round = Round(clock, until, watch._stopped.set)
    store: Any = Store(clock, other, fails)
    monkeypatch.setattr(watch, "_open_store", lambda: store)
    found: list[HangReport] = []

    def end(report: HangReport) -> None:
        found.append(report)
        raise ProcessEnded

    monkeypatch.setattr(watch, "_abort", end)
    try:
        watch._watch()
    except ProcessEnded:
        return clock.now, found[0]
    return None


def heartbeat(now: float, no_progress: float | None, step: int = 0) -> Heartbeat:
    return Heartbeat(0, "here", 7, int(now) + 1, step, "weights", no_progress=no_progress)


def test_a_hang_that_began_later_on_another_rank_is_ended(monkeypatch, tmp_path: Path) -> None:
    """A judgement takes longer than a round; the leader must not take its own for a process that did not run."""
    when = ended(monkeypatch, tmp_path, lambda now: heartbeat(now, max(0.0, now - 60)))
    assert when is not None
    assert 60 + LIMIT < when[0] < 60 + LIMIT + 12 * PAUSE
    assert when[1].starting
    assert when[1].late is not None
    assert when[1].late.rank == 0


def test_a_rank_that_was_silent_for_a_moment_is_not_gone(monkeypatch, tmp_path: Path) -> None:
    """From second 200 to 400 it is in a call that lets no other thread run, and had moved until then."""
    silent = lambda now: heartbeat(min(now, 200), 0.0) if now < 400 else heartbeat(now, 0.0)  # noqa: E731
    assert ended(monkeypatch, tmp_path, silent) is None


def test_a_rank_that_stays_silent_is_ended(monkeypatch, tmp_path: Path) -> None:
    when = ended(monkeypatch, tmp_path, lambda now: heartbeat(min(now, 100), 0.0))
    assert when is not None
    assert 100 + LIMIT < when[0] < 100 + LIMIT + 15 * PAUSE
    assert when[1].silent == (0,)


def test_a_rank_that_has_done_its_first_step_is_waited_for(monkeypatch, tmp_path: Path) -> None:
    assert ended(monkeypatch, tmp_path, lambda now: heartbeat(now, None, step=1)) is None


def test_a_store_that_does_not_answer_for_a_while_ends_no_start(monkeypatch, tmp_path: Path) -> None:
    moves = lambda now: heartbeat(now, 0.0)  # noqa: E731
    assert ended(monkeypatch, tmp_path, moves, lambda now: 300 < now < 400) is None


def test_a_store_that_is_gone_ends_the_start(monkeypatch, tmp_path: Path) -> None:
    when = ended(monkeypatch, tmp_path, lambda now: heartbeat(now, 0.0), lambda now: now > 300)
    assert when is not None
    assert 280 + LIMIT < when[0] < 300 + LIMIT + 15 * PAUSE
    assert when[1].late is None


def test_waiting_ends_with_the_wait_and_with_its_failure(monkeypatch, tmp_path: Path) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    watch = Watchdog(Comm(), 300.0, Progress(), str(tmp_path), environ)
    seen: list[bool] = []

    def called(what: str | list[str], value: str = "") -> bool:
        seen.append(watch._in_barrier)
        if "gone" in str(what):
            raise RuntimeError("no answer")
        return True

    monkeypatch.setattr(watch, "_open_store", lambda: SimpleNamespace(set=called, check=called))
    watch.store_barrier("here")
    assert not watch._in_barrier
    with pytest.raises(RuntimeError):
        watch.store_barrier("gone")
    assert not watch._in_barrier
    assert seen == [True, True, True]


def test_ranks_meet_when_the_first_one_has_seen_all(monkeypatch, tmp_path: Path) -> None:
    store = HashStore()
    watches = [
        Watchdog(
            Comm(),
            300.0,
            Progress(),
            str(tmp_path),
            {"RANK": str(rank), "WORLD_SIZE": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        )
        for rank in range(3)
    ]
    threads = []
    for watch in watches:
        monkeypatch.setattr(watch, "_open_store", lambda: store)
        threads.append(threading.Thread(target=watch.store_barrier, args=("batch",), daemon=True))
    for thread in threads[:2]:
        thread.start()
    threads[0].join(0.2)
    assert all(thread.is_alive() for thread in threads[:2]), "they wait for the third"
    threads[2].start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("second", [100, 225], ids=["between rounds", "in a judgement"])
def test_a_process_that_did_not_run_begins_anew(second: int, monkeypatch, tmp_path: Path) -> None:
    """The machine sleeps for an hour."""

    def sleep(self: Clock, seconds: float) -> None:
        self.now += 3600 if second <= self.now < second + seconds else seconds

    monkeypatch.setattr(Clock, "sleep", sleep)
    when = ended(monkeypatch, tmp_path, lambda now: heartbeat(now, max(0.0, now - 60)), until=9000)
    assert when is not None
    assert second + 3600 + LIMIT < when[0] < second + 3600 + LIMIT + 12 * PAUSE
