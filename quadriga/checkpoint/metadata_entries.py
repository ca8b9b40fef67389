"""Reads the entries of a `.metadata` of torch.distributed.checkpoint, tensors and other objects, without torch.

See `opcodes`. The entries are not compared with files here; `plan.validate_plan` and `plan.check_files` do that for
tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quadriga import limits
from quadriga.checkpoint.dcp_objects import DcpRecord, is_built
from quadriga.checkpoint.opcodes import Interpreter
from quadriga.checkpoint.plan_format import FORMAT, PlanError, format_raw


@dataclass(frozen=True)
class Entries:
    """`plan`: the tensors, in the format of `plan.json`. `objects`: entries that are not tensors, each a pickle in an
    archive of `torch.save`: (file, first byte, bytes) by name. Objects without a place are omitted. Objects with
    transformed bytes are in `transformed`: the list of transforms by name."""

    plan: dict[str, Any]
    objects: dict[str, tuple[str, int, int]]
    transformed: dict[str, list[Any]]


def read_entries(data: bytes) -> Entries:
    """The entries in the bytes of a `.metadata`. Raises PlanError if the bytes are anything else."""
    if len(data) > limits.METADATA_BYTES:
        raise PlanError(f"longer than the limit for a plan ({limits.METADATA_BYTES:,} bytes)")
    with gc_disabled():
        return _entries(Interpreter(data).run())


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disables garbage collection: with millions of objects that all stay, it would take most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _entries(value: Any) -> Entries:
    if not is_built(value, "Metadata"):
        raise PlanError("is not the plan of a checkpoint")
    entries, storage = value.fields
    infos = {}
    for index, info in zip(storage[::2], storage[1::2], strict=True):
        if not is_built(index, "MetadataIndex") or not is_built(info, "_StorageInfo"):
            raise PlanError("its storage data are not positions of tensors")
        infos[index.fields] = info.fields
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    transformed: dict[str, list[Any]] = {}
    for name, entry in zip(entries[::2], entries[1::2], strict=True):
        if type(name) is not str or type(entry) is not DcpRecord or name in tensors:
            raise PlanError(f"{format_raw(name)} is not a name of a tensor")
        if entry.kind == "BytesStorageMetadata":
            info = infos.get((name, None))
            if info is not None:
                (file, start, length), kinds = info[:3], info[3:]
                if kinds:
                    transformed[name] = kinds[0]
                else:
                    objects[name] = file, start, length
            continue
        if not is_built(entry, "TensorStorageMetadata"):
            raise PlanError(f"{format_raw(name)} is neither a tensor nor bytes")
        dtype, size, parts = entry.fields or ()
        chunks = []
        for part in parts:
            offsets, sizes = part.fields
            info = infos.get((name, offsets))
            if info is None:
                raise PlanError(f"{format_raw(name)} has a chunk at {format_raw(offsets)} that is in no file")
            chunks.append([[*offsets], [*sizes], files.setdefault(info[0], len(files)), *info[1:]])
        tensors[name] = {"dtype": dtype, "shape": [*size], "chunks": chunks}
    return Entries({"format": FORMAT, "files": [*files], "tensors": tensors}, objects, transformed)
