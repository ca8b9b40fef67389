"""Records every collective call of this rank by kind, axis and size.

It is used by tests that compare the calls with theory, and by rehearsals, which send nothing. Calls within compiled
code are not seen, so record eager runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.comm.collectives import group_named
from quadriga.comm.mesh import Mesh
from quadriga.tensors import tensors_in

# Kind by operation name, for torch's two sets of operations: those that write into a given tensor (c10d) and those that
# return a new one (_c10d_functional).
KINDS: Mapping[str, str] = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
}
# Operations that send internally, invisible to a dispatch mode: by name, a function from the operation's arguments to
# the kind and bytes of each call. The module that defines such an operation registers it here.
SENDS_INSIDE: dict[str, Callable[..., Iterator[tuple[str, int]]]] = {}
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@dataclass(frozen=True)
class RecordedCall:
    """One call on this rank. `size`: bytes of its largest input or output, so of the complete tensor."""

    kind: str
    axis: str
    size: int


class CallRecorder(TorchDispatchMode):
    """Within `with CallRecorder(axes) as recorder:` the calls are appended to `recorder.calls`.

    `axes` names groups of ranks (`axis_by_ranks`); any other group has torch's name.
    """

    def __init__(self, axes: Mapping[frozenset[int], str]) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self._axes = axes

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches first; its collectives arrive here again, on plain tensors
        result = operation(*args, **(kwargs or {}))
        if (calls_within := SENDS_INSIDE.get(operation._schema.name)) is not None:
            self.calls += [RecordedCall(kind, self._axis(args), size) for kind, size in calls_within(*args)]
        namespace, _, rest = operation._schema.name.partition("::")
        if namespace in NAMESPACES and rest in KINDS:
            given = (*args, *(kwargs or {}).values())
            sizes = [tensor.numel() * tensor.itemsize for tensor in tensors_in((given, result))]
            self.calls.append(RecordedCall(KINDS[rest], self._axis(given), max(sizes, default=0)))
        return result

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of calls by (kind, axis)."""
        return Counter((call.kind, call.axis) for call in self.calls)

    def bytes(self) -> Counter[tuple[str, str]]:
        """Sum of the sizes by (kind, axis)."""
        total: Counter[tuple[str, str]] = Counter()
        for call in self.calls:
            total[call.kind, call.axis] += call.size
        return total

    def _axis(self, given: tuple[Any, ...]) -> str:
        for item in given:
            if isinstance(item, torch.ScriptObject) and "ProcessGroup" in str(item._type()):
                return self._name(dist.ProcessGroup.unbox(item))
            if isinstance(item, str) and (group := group_named(item)) is not None:
                return self._name(group)  # functional operations take a group by its name
        return "?"

    def _name(self, group: dist.ProcessGroup) -> str:
        return self._axes.get(frozenset(dist.get_process_group_ranks(group)), str(group.group_name))


def axis_by_ranks(mesh: Mesh) -> dict[frozenset[int], str]:
    """Names of the mesh's axes by the ranks of this rank's group. `shard` is dp_shard and cp as one axis.

    The key is the set of ranks, because torch creates several groups of the same ranks. If axes have the same ranks,
    the last name counts.
    """
    return {frozenset(dist.get_process_group_ranks(group)): axis for axis, group in mesh.groups()}
