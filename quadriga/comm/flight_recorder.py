"""Reads torch's flight recorder: the operations of this rank. It records while `comm.trace_buf_size` > 0.

Torch does not record messages between two ranks over gloo. The recorder has no public functions; the private ones used
here are the same in torch 2.11 and 2.13. Builds with NCCL have a second set of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch._C import _distributed_c10d as c10d

RECORDERS = ("fr", "nccl")


class Traffic(NamedTuple):
    """The number of operations of a group that this rank has launched, and how many of them have ended."""

    launched: int
    ended: int


class GroupOperation(NamedTuple):
    """One operation: its name in torch, the name of its group, and the group's description."""

    kind: str
    group: str
    purpose: str


def traffic() -> dict[str, Traffic]:
    """The traffic by group, under names that are valid only in this process. Cheap, because it reads no entry."""
    found = {}
    for recorder, record in _records(entries=False):
        for group, status in record.get("pg_status", {}).items():
            launched, ended = (int(status[f"last_{what}_collective"]) for what in ("enqueued", "completed"))
            if launched > 0:
                found[f"{recorder}:{group}"] = Traffic(launched, max(ended, 0))
    return found


def oldest_pending(group: str) -> GroupOperation | None:
    """The operation of a group that has been pending longest; if none is pending, its newest. Reads all entries."""
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
    """The launch of one call: its time in ns since the epoch, torch's name of its group, and its number among the
    group's collectives, which is equal on all ranks of the group."""

    time_ns: int
    group: str
    sequence: int


def launches(since_ns: int) -> list[Launch]:
    """The calls that this rank has launched since then, oldest first, within `comm.trace_buf_size` entries."""
    found = [
        Launch(entry["time_created_ns"], entry["process_group"][0], entry["collective_seq_id"])
        for _, record in _records(entries=True)
        for entry in record.get("entries", ())
        if entry["time_created_ns"] >= since_ns and not entry["is_p2p"]
    ]
    return sorted(found)


def dump(path: Path) -> None:
    """Write all records, in the format in which torch itself dumps them when an NCCL collective times out."""
    texts = [getattr(c10d, f"_dump_{name}_trace")() for name in RECORDERS if hasattr(c10d, f"_dump_{name}_trace")]
    path.write_bytes(max(texts, key=len))  # gloo's or NCCL's: the backend of the run has more


def _records(entries: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in RECORDERS:
        if hasattr(c10d, f"_dump_{name}_trace_json"):
            yield name, json.loads(getattr(c10d, f"_dump_{name}_trace_json")(entries, False))
