"""Data that a profiler trace lacks over gloo: the group of each call, and the mesh axis of each group.

Over NCCL torch records the group of each call; over gloo it does not. There the flight recorder has it, and the start
time of each call, which lies within the call's range in the trace.
"""

from __future__ import annotations

from typing import Any

from quadriga.comm import flight_recorder
from quadriga.comm.mesh import Mesh

FORMAT = "quadriga-notes-1"
MESSAGES = "pp"  # the axis of point-to-point messages, which the flight recorder does not record over gloo


def notes(mesh: Mesh, attempt: int, since_ns: int) -> dict[str, Any]:
    """The notes for the trace of this rank that began at `since_ns` (ns since the epoch), in start `attempt` of the
    run. docs/traces.md explains the keys."""
    # By axis, torch's name of the group. An axis of all ranks has the default group, as `world` does. If axes share a
    # group, the last name counts.
    groups = {axis: str(group.group_name) for axis, group in mesh.groups()}
    axes = {group: axis for axis, group in groups.items()}
    return {
        "format": FORMAT,
        "attempt": attempt,
        "axes": axes,
        "same": {axis: axes[group] for axis, group in groups.items() if axes[group] != axis},
        "messages": MESSAGES if mesh.pp.size() > 1 else None,
        "launches": [[each.time_ns, each.group, each.sequence] for each in flight_recorder.launches(since_ns)],
    }
