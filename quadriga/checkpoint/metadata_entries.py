"""What `.metadata` of torch.distributed.checkpoint lists, tensors and other objects, without torch: see `opcodes`.

Nothing of it is checked against files yet: `plan.validate_plan` and `plan.check_files` do that for tensors.
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
    """`plan`: the tensors, as `plan.json` has them. `objects`: what is no tensor, a pickle in an archive of
    `torch.save` each: (file, first byte, bytes) by name. Those without a place are left out, and those that were
    transformed as they were saved: these are in `transformed`, the transforms by name."""

    plan: dict[str, Any]
    objects: dict[str, tuple[str, int, int]]
    transformed: dict[str, list[Any]]


def read_entries(data: bytes) -> Entries:
    """The entries that the bytes of a `.metadata` describe. Raises PlanError where they are anything else."""
    if len(data) > limits.METADATA_BYTES:
        raise PlanError(f"longer than a plan may be ({limits.METADATA_BYTES:,} bytes)")
    with gc_disabled():
        return _entries(Interpreter(data).run())


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Millions of objects that all stay: looking through them for garbage, again and again, takes most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _entries(value: Any) -> Entries:
    if not is_built(value, "Metadata"):
        raise PlanError("holds something else than the plan of a checkpoint")
    entries, storage = value.fields
    infos = {}
    for index, info in zip(storage[::2], storage[1::2], strict=True):
        if not is_built(index, "MetadataIndex") or not is_built(info, "_StorageInfo"):
            raise PlanError("its storage data are no places of tensors")
        infos[index.fields] = info.fields
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    transformed: dict[str, list[Any]] = {}
    for name, entry in zip(entries[::2], entries[1::2], strict=True):
        if type(name) is not str or type(entry) is not DcpRecord or name in tensors:
            raise PlanError(f"{format_raw(name)} is no name of a tensor")
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
                raise PlanError(f"{format_raw(name)} has a chunk at {format_raw(offsets)} that lies in no file")
            chunks.append([[*offsets], [*sizes], files.setdefault(info[0], len(files)), *info[1:]])
        tensors[name] = {"dtype": dtype, "shape": [*size], "chunks": chunks}
    return Entries({"format": FORMAT, "files": [*files], "tensors": tensors}, objects, transformed)
