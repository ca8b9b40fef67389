"""What counts as progress, seen from another thread; and that errors which cause each other are followed to an end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from quadriga.errors import causes
from quadriga.train.activity import Activity
from quadriga.train.out_of_memory import is_out_of_memory
from quadriga.train.progress import Progress


def moved(work, progress: Progress | None = None) -> bool:
    """Whether a second look from another thread, after `work` of this one, sees progress, functions left out."""
    activity, found = Activity(progress or Progress()), []
    go, done = threading.Event(), threading.Event()

    def looked() -> bool:
        place, _, *amounts = activity._moves()
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
    assert moved(lambda: torch.ones(5_000_000).sum())
    with open("/dev/zero", "rb") as file:
        assert moved(lambda: os.read(file.fileno(), 8192))


def test_functions_that_were_not_seen_before_are_progress() -> None:
    activity, found, back = Activity(Progress()), [], threading.Event()

    def seen_from_elsewhere() -> None:
        thread = threading.Thread(target=lambda: (found.append(list(activity._moves())[1]), back.set()))
        thread.start()
        assert back.wait(60)
        back.clear()
        thread.join()

    def elsewhere() -> None:
        seen_from_elsewhere()

    for where in (seen_from_elsewhere, elsewhere, seen_from_elsewhere, elsewhere):
        where()
    assert found == [True, True, False, False]


def test_phases_and_beats_are_progress() -> None:
    progress = Progress()
    assert moved(progress.beat, progress)
    assert moved(lambda: progress.at("data", 1), progress)


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
