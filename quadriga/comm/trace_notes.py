"""What a trace of torch's profiler leaves open over gloo: of which group each call was, and which mesh axis a group is.

Over NCCL torch writes the group beside each call; over gloo it writes none. The flight recorder knows it there, and the
moment at which each call began, which lies within the call's range of the trace.
"""

from __future__ import annotations

from typing import Any

from quadriga.comm import flight_recorder
from quadriga.comm.mesh import Mesh

FORMAT = "quadriga-notes-1"
MESSAGES = "pp"  # the axis along which ranks send to each other one by one; the recorder does not see it over gloo


def notes(mesh: Mesh, attempt: int, since_ns: int) -> dict[str, Any]:
    """For the trace of this rank that began at `since_ns` (since 1970), in this start of the run; docs/traces.md tells
    what its keys mean."""
    groups = _groups(mesh)
    axes = {group: axis for axis, group in groups.items()}
    return {
        "format": FORMAT,
        "attempt": attempt,
        "axes": axes,
        "same": {axis: axes[group] for axis, group in groups.items() if axes[group] != axis},
        "messages": MESSAGES if mesh.pp.size() > 1 else None,
        "launches": [[each.time_ns, each.group, each.sequence] for each in flight_recorder.launches(since_ns)],
    }


def _groups(mesh: Mesh) -> dict[str, str]:
    """Torch's name of the group of each axis of more than one rank. `shard` is dp_shard and cp as one.

    An axis that holds all ranks has the default group, as `world` does: of axes that share one the last name counts.
    """
    return {axis: str(group.group_name) for axis, group in mesh.groups()}
