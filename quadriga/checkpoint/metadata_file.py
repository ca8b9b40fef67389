"""`.metadata` of torch.distributed.checkpoint, read without unpickling it: see `opcodes`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quadriga import limits
from quadriga.checkpoint.dcp_objects import Record, is_whole
from quadriga.checkpoint.opcodes import Interpreter
from quadriga.checkpoint.plan import FORMAT, Plan, PlanError, checked, shown


def read(data: bytes) -> Plan:
    """The plan that the bytes of a `.metadata` describe. Raises PlanError where they are anything else."""
    if len(data) > limits.METADATA_BYTES:
        raise PlanError(f"longer than a plan may be ({limits.METADATA_BYTES:,} bytes)")
    with _no_collection():
        return checked(_as_plan(Interpreter(data).run()))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of objects that all stay: looking through them for garbage, again and again, takes most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _as_plan(value: Any) -> dict[str, Any]:
    """The plan as `plan.json` would have it, of what was interpreted; entries that are no tensors are left out."""
    if not is_whole(value, "Metadata"):
        raise PlanError("holds something else than the plan of a checkpoint")
    entries, storage = value.fields
    infos = {}
    for index, info in zip(storage[::2], storage[1::2], strict=True):
        if not is_whole(index, "MetadataIndex") or not is_whole(info, "_StorageInfo"):
            raise PlanError("its storage data are no places of tensors")
        infos[index.fields] = info.fields
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for name, entry in zip(entries[::2], entries[1::2], strict=True):
        if type(name) is not str or type(entry) is not Record or name in tensors:
            raise PlanError(f"{shown(name)} is no name of a tensor")
        if entry.kind == "BytesStorageMetadata":
            continue  # a pickled object, which is never read
        if not is_whole(entry, "TensorStorageMetadata"):
            raise PlanError(f"{shown(name)} is neither a tensor nor bytes")
        dtype, size, parts = entry.fields or ()
        chunks = []
        for part in parts:
            offsets, sizes = part.fields
            info = infos.get((name, offsets))
            if info is None:
                raise PlanError(f"{shown(name)} has a chunk at {shown(offsets)} that lies in no file")
            chunks.append([[*offsets], [*sizes], files.setdefault(info[0], len(files)), *info[1:]])
        tensors[name] = {"dtype": dtype, "shape": [*size], "chunks": chunks}
    return {"format": FORMAT, "files": [*files], "tensors": tensors}
