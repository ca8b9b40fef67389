"""What a piece of code sends: every collective by kind, axis and size, as it is called on this rank.

For tests that hold the calls equal to theory, and for rehearsals, where nothing is sent at all. Compiled code is not
looked into: record eager runs.
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

# Kind by the operation's name, in torch's two sets of operations: those that write into a given tensor (c10d) and
# those that return one (_c10d_functional).
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
# Operations that send from within, where no mode sees it: by name a function that makes of an operation's arguments the
# kind and bytes of each call. Whoever defines such an operation enters it here.
SENDS_INSIDE: dict[str, Callable[..., Iterator[tuple[str, int]]]] = {}
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@dataclass(frozen=True)
class RecordedCall:
    """One call on this rank. `size` in bytes: of the largest tensor that it takes or gives, so of the whole."""

    kind: str
    axis: str
    size: int


class CallRecorder(TorchDispatchMode):
    """Within `with CallRecorder(axes) as recorder:` the calls are kept in `recorder.calls`, in order.

    `axes` names groups of ranks (`axis_by_ranks`); a group that is not in it goes by torch's name for it.
    """

    def __init__(self, axes: Mapping[frozenset[int], str]) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self._axes = axes

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch first: what it sends comes by here again, on plain tensors
        result = operation(*args, **(kwargs or {}))
        if (calls_within := SENDS_INSIDE.get(operation._schema.name)) is not None:
            self.calls += [RecordedCall(kind, self._axis(args), size) for kind, size in calls_within(*args)]
        namespace, _, rest = operation._schema.name.partition("::")
        if namespace in NAMESPACES and rest in KINDS:
            given = (*args, *(kwargs or {}).values())
            sizes = [tensor.numel() * tensor.itemsize for tensor in _tensors((given, result))]
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
                return self._name(group)  # how the functional operations name a group
        return "?"

    def _name(self, group: dist.ProcessGroup) -> str:
        return self._axes.get(frozenset(dist.get_process_group_ranks(group)), str(group.group_name))


def axis_by_ranks(mesh: Mesh) -> dict[frozenset[int], str]:
    """Names of the mesh's axes by the ranks of this rank's group. `shard` is dp_shard and cp as one axis.

    By ranks, since torch makes several groups of the same ranks. Of axes that hold the same ones the last name counts.
    """
    return {frozenset(dist.get_process_group_ranks(group)): axis for axis, group in mesh.groups()}


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for one in item:
            yield from _tensors(one)
