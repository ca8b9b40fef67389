"""The plan of a checkpoint's tensors: which part of which tensor is at which bytes of which file.

`torch.distributed.checkpoint` saves its plan as a pickle, `.metadata`. A save also writes the same plan as JSON:

    {"format": "quadriga-plan-1",
     "files": ["__0_0.distcp", "__1_0.distcp"],
     "tensors": {
      "model.norm.weight": {"dtype": "float32", "shape": [64],
                           "chunks": [[[0], [32], 0, 0, 1652], [[32], [32], 1, 0, 1652]]}
     }}

A chunk is [offsets, sizes, number of the file, first byte, bytes]; a sixth entry lists the transforms of its bytes
(compression), which only other writers use. Loads read `plan.json`. For a folder without it, of an earlier version or
of another program, `metadata_file` makes the same plan from `.metadata`.

A forged checkpoint can have valid hashes, so nothing here is trusted. The type and range of every value are checked,
and chunks must tile their tensor and be inside their file. DCP's objects are built from checked values.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from quadriga import limits
from quadriga.checkpoint.plan_format import DTYPE_NAMES, FORMAT, PLAN_FILE, PlanError, format_raw

__all__ = ["PLAN_FILE", "PlanError", "format_raw"]  # reexported

DTYPES: dict[str, torch.dtype] = {word: getattr(torch, word) for word in DTYPE_NAMES if hasattr(torch, word)}
FILE_NAME = re.compile(r"[^/\\\0]{1,255}")
Chunk = list[Any]  # in the format of JSON, see above


@dataclass(frozen=True)
class PlannedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


@dataclass(frozen=True)
class Plan:
    """A plan with checked values."""

    files: list[str]
    tensors: dict[str, PlannedTensor]

    def metadata(self, names: Iterable[str]) -> Metadata:
        """DCP's metadata of these tensors. Raises KeyError for a name that is not in the plan."""
        tensors, storage = {}, {}
        for name in names:
            planned = self.tensors[name]
            chunks = []
            for number, (offsets, sizes, file, start, length, *transforms) in enumerate(planned.chunks):
                position = torch.Size(offsets)
                chunks.append(ChunkStorageMetadata(position, torch.Size(sizes)))
                info = _StorageInfo(self.files[file], start, length, *transforms)
                storage[MetadataIndex(name, position, number)] = info
            properties = TensorProperties(dtype=planned.dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(planned.shape), chunks)
        return Metadata(cast(dict[str, Any], tensors), storage_data=storage, storage_meta=StorageMeta())

    def as_json(self) -> bytes:
        """The text of `plan.json`."""
        return _as_text(
            self.files,
            ((name, planned.dtype, planned.shape, planned.chunks) for name, planned in self.tensors.items()),
        )


def from_metadata(metadata: Metadata) -> bytes:
    """The text of `plan.json` for the metadata that DCP wrote. Entries that are not tensors are omitted."""
    files: dict[str, int] = {}
    tensors = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = []
            for chunk in entry.chunks:
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                file = files.setdefault(info.relative_path, len(files))
                transforms = [list(info.transform_descriptors)] if info.transform_descriptors else []
                chunks.append([[*chunk.offsets], [*chunk.sizes], file, info.offset, info.length, *transforms])
            tensors.append((name, entry.properties.dtype, entry.size, chunks))
    return _as_text(list(files), tensors)


def _as_text(files: list[str], tensors: Iterable[tuple[str, torch.dtype, Sequence[int], list[Chunk]]]) -> bytes:
    """JSON with one tensor per line, for readability."""
    lines = []
    for name, dtype, shape, chunks in tensors:
        entry = {"dtype": str(dtype).removeprefix("torch."), "shape": [*shape], "chunks": chunks}
        lines.append(f" {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}")
    head = f'{{"format": {json.dumps(FORMAT)},\n "files": {json.dumps(files)},\n "tensors": {{\n'
    return (head + ",\n".join(lines) + "\n}}\n").encode()


def parse_plan(text: bytes) -> Plan:
    """Parses the text of `plan.json`. Raises PlanError if it is invalid. `check_files` compares it with the files."""
    check_text(text)
    try:
        raw = json.loads(text)
    except RecursionError:
        raise PlanError("is nested deeper than a plan") from None
    except ValueError as error:  # bad JSON, bad UTF-8, numbers of thousands of digits
        raise PlanError(f"not readable JSON: {error}") from error
    return validate_plan(raw)


def check_text(text: bytes) -> None:
    """Raises PlanError if a text is too large to be parsed."""
    if len(text) > limits.PLAN_BYTES:
        raise PlanError(f"longer than the limit for a plan ({limits.PLAN_BYTES:,} bytes)")
    if text.count(b"[") + text.count(b"{") > 4 * limits.PLAN_CHUNKS:
        raise PlanError(f"more entries than the limit for a plan ({limits.PLAN_CHUNKS:,} chunks)")


def validate_plan(raw: Any) -> Plan:
    """Converts a JSON value to a plan. Raises PlanError if any value is invalid."""
    if type(raw) is not dict or raw.keys() != {"format", "files", "tensors"}:
        raise PlanError('not a JSON object of "format", "files" and "tensors"')
    if raw["format"] != FORMAT:
        raise PlanError(f"has format {format_raw(raw['format'])}, this version reads {FORMAT!r}")
    files, tensors = raw["files"], raw["tensors"]
    if type(files) is not list or type(tensors) is not dict:
        raise PlanError('"files" must be an array and "tensors" an object')
    for name in files:
        if type(name) is not str or name in (".", "..") or not FILE_NAME.fullmatch(name):
            raise PlanError(f"{format_raw(name)} is not a name of a file in the folder")
    chunks_left = limits.PLAN_CHUNKS
    planned = {}
    for name, entry in tensors.items():
        planned[name] = _tensor(name, entry, len(files))
        chunks_left -= len(planned[name].chunks)
        if chunks_left < 0:
            raise PlanError(f"more chunks than the limit for a plan ({limits.PLAN_CHUNKS:,})")
    return Plan(files, planned)


def check_files(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Raises PlanError if a chunk is not inside one of these files. `sizes`: in bytes, by name."""
    for file in plan.files:
        if file not in sizes:
            raise PlanError(f"{format_raw(file)} is not a regular file of this checkpoint")
    ends = [sizes[file] for file in plan.files]
    for name, planned in plan.tensors.items():
        for _, _, file, start, length, *_ in planned.chunks:
            if start + length > ends[file]:
                what = f"bytes {start} to {start + length} of {plan.files[file]}, which has {ends[file]}"
                raise PlanError(f"{format_raw(name)} is at {what}")


def _tensor(name: str, entry: Any, files: int) -> PlannedTensor:
    if len(name) > limits.PLAN_NAME or not name:
        raise PlanError(f"{format_raw(name)} is not a name of a tensor (1 to {limits.PLAN_NAME} characters)")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "chunks"}:
        raise PlanError(f'{format_raw(name)}: not a JSON object of "dtype", "shape" and "chunks"')
    word, shape, chunks = entry["dtype"], entry["shape"], entry["chunks"]
    dtype = DTYPES.get(word) if type(word) is str else None
    if dtype is None:
        raise PlanError(f"{format_raw(name)}: {format_raw(word)} is not a dtype of this torch")
    if type(shape) is not list or len(shape) > limits.PLAN_DIMENSIONS or not all(map(_is_size, shape)):
        raise PlanError(f"{format_raw(name)}: {format_raw(shape)} is not a shape")
    numbers = math.prod(shape)
    if numbers * dtype.itemsize > limits.PLAN_TENSOR_BYTES:
        raise PlanError(f"{format_raw(name)}: a tensor of shape {format_raw(shape)} is too large")
    if type(chunks) is not list:
        raise PlanError(f'{format_raw(name)}: "chunks" must be an array')
    there = 0
    seen = set()
    for chunk in chunks:
        held = _held(chunk, shape, files)
        # A chunk has at least the bytes of its elements, so a plan cannot allocate more memory than its files have.
        if held is None or (held * dtype.itemsize > chunk[4] and len(chunk) == 5):
            _refuse_chunk(name, chunk, shape)
        there += held
        seen.add(tuple(chunk[0]))
    if there != numbers or len(seen) != len(chunks) or not (len(chunks) < 2 or _tile(chunks, shape)):
        raise PlanError(f"{format_raw(name)}: its {len(chunks)} chunks do not make up its shape {format_raw(shape)}")
    return PlannedTensor(dtype, tuple(shape), chunks)


def _tile(chunks: list[Chunk], shape: list[int]) -> bool:
    """Whether every element is in exactly one chunk. Sum the corners of all chunks, with a negative sign if an odd
    number of coordinates are upper ends: exactly then the sum is that of the corners of the whole tensor."""
    if not math.prod(shape):
        return True
    split = [axis for axis in range(len(shape)) if any(chunk[1][axis] != shape[axis] for chunk in chunks)]
    if not 0 < len(split) <= 4:  # no layout splits more axes, and each doubles the corners
        return False
    # A corner is one number, which fits 64 bits, because a tensor has at most PLAN_TENSOR_BYTES. The last is the whole.
    positive, negative = np.zeros((2, 2 ** len(split) // 2, len(chunks) + 1), np.int64)
    bounds, stride = [], 1
    for axis in split:
        lower = [*(chunk[0][axis] for chunk in chunks), 0]
        upper = [*(chunk[0][axis] + chunk[1][axis] for chunk in chunks), shape[axis]]
        bounds.append((stride * np.array(lower, np.int64), stride * np.array(upper, np.int64)))
        stride *= shape[axis] + 1
    rows = (iter(positive), iter(negative))
    for ends in itertools.product((0, 1), repeat=len(split)):
        row = next(rows[sum(ends) % 2])
        for bound, end in zip(bounds, ends, strict=True):
            row += bound[end]
    # The corners of the whole tensor have the opposite sign.
    swapped = positive[:, -1].copy()
    positive[:, -1], negative[:, -1] = negative[:, -1], swapped
    return bool(np.array_equal(np.sort(positive, axis=None), np.sort(negative, axis=None)))


def _held(chunk: Any, shape: list[int], files: int) -> int | None:
    """The number of elements of a chunk; None if it is not a chunk of a tensor of this shape."""
    if type(chunk) is not list or not 5 <= len(chunk) <= 6:
        return None
    offsets, sizes, file, start, length = chunk[:5]
    if not (type(offsets) is type(sizes) is list) or not (len(offsets) == len(sizes) == len(shape)):
        return None
    held = 1
    for offset, size, whole in zip(offsets, sizes, shape, strict=True):
        if not (type(offset) is type(size) is int) or offset < 0 or size < 0 or offset + size > whole:
            return None
        held *= size
    if not (type(file) is type(start) is type(length) is int) or not 0 <= file < files or start < 0 or length < 0:
        return None
    if len(chunk) == 6 and not (
        type(chunk[5]) is list and len(chunk[5]) <= limits.PLAN_DIMENSIONS and all(map(_is_word, chunk[5]))
    ):
        return None
    return held


def _refuse_chunk(name: str, chunk: Any, shape: list[int]) -> NoReturn:
    raise PlanError(f"{format_raw(name)}: {format_raw(chunk)} is not a chunk of a tensor of shape {format_raw(shape)}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.PLAN_TENSOR_BYTES


def _is_word(value: Any) -> bool:
    return type(value) is str and len(value) <= limits.PLAN_NAME
