"""What the watchdogs of ranks read in the rendezvous store, which anybody who reaches its port can write."""

from __future__ import annotations

from pathlib import Path

from fuzzing import Reader

from quadriga.resilience.hang_report import (
    HangReport,
    Heartbeat,
    hang_fault,
    late_rank,
    rank_on_same_host,
    silent_ranks,
)

HEARTBEAT = Heartbeat(1, "host1", 4711, 7, 3, "forward", 1.5, 2.5, None, 99)
REPORT = HangReport(HEARTBEAT, (1, 2), HEARTBEAT, "gloo:all_reduce of group 0", 3, False, 4, 8.5, 1.8e9, 0)


def build_heartbeat(folder: Path) -> None:
    (folder / "heartbeat").write_text(HEARTBEAT.to_json())


def read_heartbeat(folder: Path) -> None:
    heartbeats = {0: HEARTBEAT, 1: Heartbeat.from_json((folder / "heartbeat").read_bytes())}
    late = late_rank(heartbeats, silent_ranks(heartbeats, heartbeats), {0})
    assert late is not None
    rank_on_same_host(late, heartbeats, ())


def build_hang_report(folder: Path) -> None:
    (folder / "alarm").write_text(REPORT.to_json())


def read_hang_report(folder: Path) -> None:
    report = str(hang_fault(HangReport.from_json((folder / "alarm").read_bytes()), "", "/run/traces"))
    assert all(line.isprintable() for line in report.splitlines())


READERS = [Reader("heartbeat", build_heartbeat, read_heartbeat), Reader("alarm", build_hang_report, read_hang_report)]
