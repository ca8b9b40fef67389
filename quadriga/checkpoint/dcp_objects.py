"""The objects of a plan of torch.distributed.checkpoint (DCP), as plain records.

`NAMES`: every global name that is allowed in the pickle of a plan. `FIELDS`: for each class, a function that converts
the pickled state to fields; it returns None for a state that no plan has. Fields are numbers, strings, and records of
known classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.checkpoint.plan_format import DTYPE_NAMES


@dataclass(frozen=True)
class GlobalName:
    """A global name in the pickle: of a class, a function or a dtype."""

    kind: str
    value: Any = None


class DcpRecord:
    """An object of a class of DCP. `fields`: the checked state from the opcode BUILD, as `FIELDS` returned it."""

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fields: tuple[Any, ...] | None = None


class Pairs(list[Any]):
    """A dict, as key, value, key, value: nothing is hashed before the types of its keys are checked."""

    __slots__ = ()


SIZE, LAYOUT, MEMORY, PATH = GlobalName("Size"), GlobalName("layout"), GlobalName("memory format"), GlobalName("path")
STRIDED, A_FORMAT, A_PATH = GlobalName("strided"), GlobalName("a memory format"), GlobalName("a path")
METADATA = "torch.distributed.checkpoint.metadata"
RECORDS = {"Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"}
RECORDS |= {"TensorProperties", "MetadataIndex", "StorageMeta"}
OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.0 to 2.2 had TensorProperties
NAMES: dict[tuple[str, str], GlobalName] = {
    **{(METADATA, name): GlobalName("record", name) for name in RECORDS},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): GlobalName("record", "_StorageInfo"),
    (OLDER, "TensorProperties"): GlobalName("record", "TensorProperties"),
    (METADATA, "_MEM_FORMAT_ENCODING"): MEMORY,
    (OLDER, "MEM_FORMAT_ENCODING"): MEMORY,
    ("torch.serialization", "_get_layout"): LAYOUT,
    ("torch", "Size"): SIZE,
    **{("torch", name): GlobalName("dtype", name) for name in DTYPE_NAMES},
    **{(module, name): PATH for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


# The state of the classes that have millions of objects in a large plan.
SMALL: dict[str, dict[str, type]] = {
    "ChunkStorageMetadata": {"offsets": tuple, "sizes": tuple},
    "MetadataIndex": {"fqn": str, "offset": tuple, "index": int},
    "_StorageInfo": {"relative_path": str, "offset": int, "length": int},
}


def is_size(value: Any) -> bool:
    """Whether it is a tuple of integers, as `torch.Size` takes."""
    return type(value) is tuple and all(type(number) is int for number in value)


def properties(state: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """(dtype,) from the state of `TensorProperties`: (dtype, layout, requires_grad, memory format, pinned)."""
    if len(state) != 5 or state[1] is not STRIDED or state[3] is not A_FORMAT:
        return None
    dtype = state[0]
    return (dtype.value,) if type(dtype) is GlobalName and dtype.kind == "dtype" else None


def _chunk(state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if state.keys() != {"offsets", "sizes"} or not is_size(state["offsets"]) or not is_size(state["sizes"]):
        return None
    return state["offsets"], state["sizes"]


def _tensor(state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if state.keys() != {"properties", "size", "chunks"}:
        return None
    properties, size, chunks = state["properties"], state["size"], state["chunks"]
    if not is_built(properties, "TensorProperties") or not is_size(size) or type(chunks) is not list:
        return None
    if not all(is_built(chunk, "ChunkStorageMetadata") for chunk in chunks):
        return None
    return properties.fields[0], size, chunks


def _index(state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """(name, offsets or None); the third field is a hint for a search and is ignored."""
    if not {"fqn"} <= state.keys() <= {"fqn", "offset", "index"} or type(state["fqn"]) is not str:
        return None
    offset, hint = state.get("offset"), state.get("index")
    if not (offset is None or is_size(offset)) or not (hint is None or type(hint) is int):
        return None
    return state["fqn"], offset


def _storage_info(state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """(file, first byte, bytes), followed by the list of transforms if there are any."""
    needed = {"relative_path", "offset", "length"}
    if not needed <= state.keys() <= needed | {"transform_descriptors"} or type(state["relative_path"]) is not str:
        return None
    offset, length, transforms = state["offset"], state["length"], state.get("transform_descriptors")
    if not (type(offset) is type(length) is int) or type(transforms) not in (list, tuple, type(None)):
        return None
    return (state["relative_path"], offset, length, *([list(transforms)] if transforms else []))


def _metadata(state: Mapping[str, Any]) -> tuple[Any, ...] | None:
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    return (entries, storage) if type(entries) is type(storage) is Pairs else None


def _ignored(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return ()


FIELDS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, ...] | None]] = {
    "Metadata": _metadata,
    "TensorStorageMetadata": _tensor,
    "ChunkStorageMetadata": _chunk,
    "MetadataIndex": _index,
    "_StorageInfo": _storage_info,
    "TensorProperties": lambda state: None,  # its state is a tuple
    "BytesStorageMetadata": _ignored,
    "StorageMeta": _ignored,
}


def is_built(value: Any, kind: str) -> bool:
    """Whether it is an object of this class and its state is set."""
    return type(value) is DcpRecord and value.kind == kind and value.fields is not None
