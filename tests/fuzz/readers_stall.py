"""What the watchdogs of ranks read in the rendezvous store, which anybody who reaches its port can write."""

from __future__ import annotations

from pathlib import Path

from fuzzing import Reader

from quadriga.resilience.hang_report import Beat, Stall, fault, helper_of, late_rank, silent_ranks

BEAT = Beat(1, "host1", 4711, 7, 3, "forward", 1.5, 2.5, None, 99)
ALARM = Stall(BEAT, (1, 2), BEAT, "gloo:all_reduce of group 0", 3, False, 4, 8.5, 1.8e9, 0)


def build_beat(folder: Path) -> None:
    (folder / "beat").write_text(BEAT.to_json())


def read_beat(folder: Path) -> None:
    beats = {0: BEAT, 1: Beat.from_json((folder / "beat").read_bytes())}
    late = late_rank(beats, silent_ranks(beats, beats), {0})
    assert late is not None
    helper_of(late, beats, ())


def build_alarm(folder: Path) -> None:
    (folder / "alarm").write_text(ALARM.to_json())


def read_alarm(folder: Path) -> None:
    report = str(fault(Stall.from_json((folder / "alarm").read_bytes()), "", "/run/traces"))
    assert all(line.isprintable() for line in report.splitlines())


READERS = [Reader("heartbeat", build_beat, read_beat), Reader("alarm", build_alarm, read_alarm)]
