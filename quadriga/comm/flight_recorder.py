"""What torch's flight recorder knows of the operations of this rank. It records while `comm.trace_buf_size` > 0.

Messages between two ranks over gloo are not recorded by torch. The recorder's functions have no public names; those
used here are the same in torch 2.11 and 2.13, and there is a second set of them in builds with NCCL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch._C import _distributed_c10d as c10d

RECORDERS = ("fr", "nccl")


class Traffic(NamedTuple):
    """How many operations of a group this rank has launched, and how many of them have ended."""

    launched: int
    ended: int


class GroupOperation(NamedTuple):
    """One operation: torch's name of it, the name of its group, and what the group is for."""

    kind: str
    group: str
    purpose: str


def traffic() -> dict[str, Traffic]:
    """By group, under names that mean something in this process alone. Cheap: no entry is read."""
    found = {}
    for recorder, record in _records(entries=False):
        for group, status in record.get("pg_status", {}).items():
            launched, ended = (int(status[f"last_{what}_collective"]) for what in ("enqueued", "completed"))
            if launched > 0:
                found[f"{recorder}:{group}"] = Traffic(launched, max(ended, 0))
    return found


def oldest_pending(group: str) -> GroupOperation | None:
    """The operation of a group that has waited longest; if none waits, its newest. Reads all entries."""
    own = [
        entry
        for recorder, record in _records(entries=True)
        for entry in record.get("entries", ())
        if f"{recorder}:{entry['pg_id']}" == group
    ]
    waiting = [entry for entry in own if not entry["retired"] and entry["state"] != "completed"]
    entry = waiting[0] if waiting else own[-1] if own else None
    return GroupOperation(entry["profiling_name"], *entry["process_group"]) if entry else None


class Launch(NamedTuple):
    """One call, as it was begun: when, in ns since 1970; torch's name of its group; its number among the collectives of
    the group, alike on all its ranks."""

    time_ns: int
    group: str
    sequence: int


def launches(since_ns: int) -> list[Launch]:
    """What this rank has begun since then, oldest first, as far as the recorder remembers (`comm.trace_buf_size`)."""
    found = [
        Launch(entry["time_created_ns"], entry["process_group"][0], entry["collective_seq_id"])
        for _, record in _records(entries=True)
        for entry in record.get("entries", ())
        if entry["time_created_ns"] >= since_ns and not entry["is_p2p"]
    ]
    return sorted(found)


def dump(path: Path) -> None:
    """Write all that is recorded, in the form in which torch itself leaves it when a collective of NCCL times out."""
    texts = [getattr(c10d, f"_dump_{name}_trace")() for name in RECORDERS if hasattr(c10d, f"_dump_{name}_trace")]
    path.write_bytes(max(texts, key=len))  # of gloo or of NCCL, whichever carries the run


def _records(entries: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in RECORDERS:
        if hasattr(c10d, f"_dump_{name}_trace_json"):
            yield name, json.loads(getattr(c10d, f"_dump_{name}_trace_json")(entries, False))
