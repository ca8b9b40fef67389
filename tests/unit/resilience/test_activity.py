"""What counts as progress, seen from another thread; and that errors which cause each other are followed to an end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quadriga.errors import causes
from quadriga.resilience import activity as activity_module
from quadriga.resilience.activity import ActivityMonitor
from quadriga.resilience.out_of_memory import is_out_of_memory
from quadriga.resilience.progress import Progress


def moved(work, progress: Progress | None = None) -> bool:
    """Whether a second look from another thread, after `work` of this one, sees progress, functions left out."""
    activity, found = ActivityMonitor(progress or Progress(), 0.1), []
    go, done = threading.Event(), threading.Event()

    def looked() -> bool:
        place, _, *amounts = activity._progress_signs()
        return place or any(amounts)

    def watch() -> None:
        for _ in range(3):  # what the first looks themselves do for the first time
            looked()
        found.append(looked())
        go.set()
        assert done.wait(60)
        found.append(looked())

    thread = threading.Thread(target=watch)
    thread.start()
    assert go.wait(60)
    work()
    done.set()
    thread.join()
    assert found[0] is False
    return found[1]


def spin() -> None:
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass


def works_in_a_child() -> None:
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)


def test_a_loop_that_does_nothing_is_no_progress() -> None:
    assert not moved(spin)
    assert not moved(lambda: time.sleep(0.2))


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_bytes_memory_and_children_are_progress() -> None:
    assert moved(works_in_a_child)
    assert moved(lambda: torch.ones(20_000_000).sum())  # 80 MB: above 32 MB malloc always takes new pages
    with open("/dev/zero", "rb") as file:
        assert moved(lambda: os.read(file.fileno(), 8192))


@pytest.mark.parametrize(
    ("name", "least"), [("bytes", 40960.0), ("child_seconds", 0.25), ("page_faults", 256.0)], ids=str
)
def test_a_trickle_does_not_add_up_and_a_slow_download_counts(name: str, least: float, monkeypatch) -> None:
    """At the usual pause of 5 s: 24 KB of a system monitor every third look, against 8 KiB a second."""
    amounts = iter([0.0, *(0.6 * least * n for n in range(1, 60)), 0.6 * least * 59 + least])
    monkeypatch.setattr(activity_module, "_usage", lambda: iter([(name, next(amounts))]))
    activity = ActivityMonitor(Progress(), 5.0)
    moved = [list(activity._progress_signs())[-1] for _ in range(61)]
    assert moved == [False] * 60 + [True]
    # Less than before: a child is gone; what the others do from there on counts.
    fewer = iter([1.0, 1.0 + least])
    monkeypatch.setattr(activity_module, "_usage", lambda: iter([(name, next(fewer))]))
    assert [list(activity._progress_signs())[-1] for _ in range(2)] == [False, True]


def test_a_rank_that_waits_for_others_makes_no_progress_whatever_else_goes_on(monkeypatch) -> None:
    clock, amounts = [0.0], [0.0]
    monkeypatch.setattr(activity_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(activity_module, "_usage", lambda: iter([("bytes", amounts[0])]))
    activity = ActivityMonitor(Progress(), 5.0)
    activity.poll()
    for _ in range(10):
        clock[0], amounts[0] = clock[0] + 5, amounts[0] + 1e6
        waited = activity.poll(waits=True)
    assert waited == 50
    clock[0] += 5
    activity.poll(waits=True)
    assert activity.poll() == 55  # what went on meanwhile is no progress afterwards either
    amounts[0] += 1e6
    assert activity.poll() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_processes_that_report_in_the_background_are_left_out(tmp_path: Path) -> None:
    found = []
    for name in ("wandb-core", "compiler"):
        program = tmp_path / name
        program.symlink_to(shutil.which("cat") or "")
        with subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"x")
            child.stdin.flush()
            child.stdout.read(1)  # it runs under its own name
            found.append(child.pid in set(activity_module._descendants(os.getpid())))
            child.stdin.close()
    assert found == [False, True]


def test_functions_that_were_not_seen_before_are_progress() -> None:
    activity, found, back = ActivityMonitor(Progress(), 0.1), [], threading.Event()

    def seen_from_elsewhere() -> None:
        thread = threading.Thread(target=lambda: (found.append(list(activity._progress_signs())[1]), back.set()))
        thread.start()
        assert back.wait(60)
        back.clear()
        thread.join()

    def elsewhere() -> None:
        seen_from_elsewhere()

    for where in (seen_from_elsewhere, elsewhere, seen_from_elsewhere, elsewhere):
        where()
    assert found == [True, True, False, False]


def test_phases_and_heartbeats_are_progress() -> None:
    progress = Progress()
    assert moved(progress.tick, progress)
    assert moved(lambda: progress.enter_phase("data", 1), progress)


def test_causes_are_followed_once() -> None:
    one, other = ValueError("one"), KeyError("other")
    one.__cause__, other.__cause__ = other, one
    assert list(causes(one)) == [one, other]
    other.__cause__ = None
    other.__context__ = one
    assert list(causes(one)) == [one, other]
    alone = ValueError()
    alone.__cause__ = alone
    assert list(causes(alone)) == [alone]
    assert not is_out_of_memory(alone)
    assert list(causes(None)) == []
