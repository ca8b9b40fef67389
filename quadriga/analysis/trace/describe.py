"""Reads kind, bytes and group of a collective from a row of a trace, in torch's spellings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.analysis.trace.fields import numel

# The kind of an operation is the first one that its name contains.
KINDS = {
    **{kind.replace("_", ""): kind for kind in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all")},
    **{kind: kind for kind in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all", "broadcast", "barrier")},
    "sendrecv": "send_recv",
    **{kind: kind for kind in ("send", "recv", "scatter", "gather", "reduce")},
}
# Dtypes as RecordFunction spells them for C++ (`c10::BFloat16`, `long int`) and for NCCL (`BFloat16`, `Long`).
ITEM_BYTES = {
    "double": 8, "long int": 8, "long": 8, "float": 4, "int": 4, "short": 2, "bfloat16": 2, "half": 2, "byte": 1,
    "unsigned char": 1, "signed char": 1, "char": 1, "bool": 1, "complexfloat": 8, "complexdouble": 16,
    "float64": 8, "float32": 4, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1,
}  # fmt: skip
OUTPUT_FIRST = ("all_gather", "reduce_scatter", "all_to_all")
ANNOTATION_PREFIX = "quadriga:collective "  # prefix of Quadriga's annotations (quadriga/comm/slots.py)
AXIS_OF_PURPOSE = {"default_pg": "world", "mesh_dp_shard": "shard"}
UNKNOWN = "?"
COLLECTIVE_NAMES = re.compile(
    r"nccl|rccl|nvshmem|oneccl|all_?gather|reduce_?scatter|all_?reduce|all_?to_?all", re.IGNORECASE
)


@dataclass
class CallInfo:
    """What is known of a call. `count`: elements of its largest input or output tensor; `item`: bytes per element;
    `inputs`: elements of its input, by which its range on gloo's threads is found. `group`: torch's name of the group;
    `ranks`: () if unknown."""

    kind: str
    count: int | None = None
    item: int | None = None
    inputs: int | None = None
    axis: str | None = None
    group: str | None = None
    purpose: str | None = None
    ranks: tuple[int, ...] = ()
    group_size: int | None = None
    sequence: int | None = None
    backend: str | None = None

    @property
    def size(self) -> int | None:
        """Bytes of the largest tensor; 0 for a barrier; None if unknown."""
        if self.kind == "barrier":
            return 0
        return None if self.count is None or self.item is None else self.count * self.item

    def fill(self, other: CallInfo) -> None:
        """Fill unknown fields from `other`, an operation within this one. `count` is the maximum of both."""
        counts = [count for count in (self.count, other.count) if count is not None]
        for name, value in vars(other).items():
            if getattr(self, name) in (None, ()):
                setattr(self, name, value)
        self.count = max(counts, default=None)


def kind_of(name: str) -> str | None:
    """The kind of collective of an operation or kernel, by its name; None if it is not one."""
    lower = name.lower()
    return next((kind for word, kind in KINDS.items() if word in lower), None)


def item_bytes(dtype: str) -> int | None:
    plain = dtype.removeprefix("c10::").lower()
    return 1 if plain.startswith("float8") else ITEM_BYTES.get(plain)


def info_of_operation(name: str, args: Mapping[str, Any]) -> CallInfo | None:
    """The call of an operation `namespace::operation`, of record_param_comms, or of a kernel with its arguments; None
    if it is not a call."""
    if "Collective name" in args:
        return _info_of_record(args)
    namespace, _, operation = name.rpartition("::")
    kind = kind_of(operation) if namespace else None
    if kind is None:
        return None
    found = CallInfo(kind, backend="symm_mem" if namespace == "symm_mem" else None)
    if kind != "barrier":
        _measure(found, namespace, args)
    return found


def info_of_annotation(name: str) -> CallInfo:
    """The call of an annotation: `quadriga:collective axis=shard kind=all_gather bytes=8 dtype=float32 ranks=4 ...`."""
    fields = dict(pair.split("=", 1) for pair in name.split() if "=" in pair)
    found = CallInfo(fields.get("kind", UNKNOWN), axis=fields.get("axis"), backend=fields.get("backend"))
    found.count, found.item = _count(fields.get("bytes", "")), 1
    found.group_size = _count(fields.get("ranks", ""))
    return found


def _count(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None


def axis_of(purpose: str) -> str:
    """The axis of a group, from torch's description of it: `mesh_tp` -> `tp`."""
    return AXIS_OF_PURPOSE.get(purpose) or purpose.removeprefix("mesh_") or UNKNOWN


def _info_of_record(args: Mapping[str, Any]) -> CallInfo | None:
    """The call of ParamCommsDebugInfo, which NCCL's process group adds to record_param_comms, and Kineto to kernels."""
    kind = kind_of(args["Collective name"])
    if kind is None:
        return None
    counts = [args[name] for name in ("In msg nelems", "Out msg nelems") if name in args]
    return CallInfo(
        kind,
        count=max(counts, default=None),
        item=item_bytes(args.get("dtype", "")),
        group=args.get("Process Group Name") or None,
        purpose=args.get("Process Group Description") or None,
        ranks=args.get("Process Group Ranks", ()),
        group_size=args.get("Group size"),
        sequence=args.get("Seq"),
    )


def _measure(found: CallInfo, namespace: str, args: Mapping[str, Any]) -> None:
    """Set the sizes from the operation's inputs. Operations of c10d have their output tensor as first input."""
    dims, types = args.get("Input Dims") or (), args.get("Input type") or ()
    tensors = [(each, kind) for each, kind in zip(dims, types, strict=False) if kind not in ("", "Scalar")]
    if not tensors:
        return
    counts = [numel(dims) for dims, _ in tensors]
    items = [item for _, kind in tensors if (item := item_bytes(kind))]
    output_first = namespace == "c10d" and found.kind in OUTPUT_FIRST and len(counts) > 1
    found.inputs = counts[1] if output_first else counts[0]
    found.item = items[0] if items else None
    found.count = max(counts)
