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
of another program, `parse_metadata` makes the same plan from `.metadata`, without unpickling it: see `opcodes`.

A forged checkpoint can have valid hashes, so nothing here is trusted. The type and range of every value are checked,
and chunks must tile their tensor and be inside their file. DCP's objects are built from checked values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from quadriga import limits
from quadriga.checkpoint.files import Files, Location, files_at, join
from quadriga.checkpoint.folder import CheckpointError, FileFacts
from quadriga.checkpoint.manifest import METADATA, is_file_name
from quadriga.checkpoint.messages import refusal_error
from quadriga.checkpoint.metadata_entries import read_entries
from quadriga.checkpoint.plan_format import DTYPE_NAMES, FORMAT, LINK, PLAN_FILE, PlanError, format_raw

__all__ = ["PLAN_FILE", "PlanError", "format_raw"]  # reexported

DTYPES: dict[str, torch.dtype] = {word: getattr(torch, word) for word in DTYPE_NAMES if hasattr(torch, word)}
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

    def as_json(self) -> bytes:
        """The same plan as JSON, which `parse_plan` reads."""
        tensors = {
            name: {"dtype": str(planned.dtype).removeprefix("torch."), "shape": planned.shape, "chunks": planned.chunks}
            for name, planned in self.tensors.items()
        }
        return json.dumps({"format": FORMAT, "files": self.files, "tensors": tensors}, separators=(",", ":")).encode()


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


def parse_metadata(data: bytes) -> Plan:
    """The plan in the bytes of a `.metadata`. Raises PlanError if the bytes are anything else."""
    return validate_plan(read_entries(data).plan)


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
        if type(name) is not str or not is_file_name(name):
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


def read_plan(location: Location, facts: Mapping[str, FileFacts], retries: int) -> tuple[Plan, bytes]:
    """The checked plan of a folder, and its JSON text if `plan.json` was read, else b"". Raises CheckpointError."""
    files, name = files_at(location, retries), METADATA
    try:
        if PLAN_FILE in facts if facts else files.exists(join(location, PLAN_FILE)):
            name = PLAN_FILE
            text = _content(files, location, name, limits.PLAN_BYTES, facts.get(name))
            plan = parse_plan(text)
        else:
            text, content = b"", _content(files, location, name, limits.METADATA_BYTES, facts.get(name))
            plan = parse_metadata(content)
        check_files(plan, {file: _size(files, location, file, facts) for file in plan.files})
        return plan, text
    except PlanError as error:
        raise refusal_error(join(location, name), error) from error
    except OSError as error:
        raise CheckpointError(f"{join(location, name)} cannot be read: {error.strerror or error}") from error


def _content(files: Files, location: Location, name: str, most: int, fact: FileFacts | None) -> bytes:
    path = join(location, name)

    def look() -> bytes:
        if files.is_link(path):
            raise PlanError(f"{format_raw(name)} {LINK}")
        with files.open(path, "rb") as file:
            return file.read(most + 1)

    content = files.retried(look)
    if len(content) > most:
        raise PlanError(f"longer than the limit for a plan ({most:,} bytes)")
    if fact is not None and hashlib.sha256(content).hexdigest() != fact.sha256:
        raise PlanError("its hash differs from the one in the manifest")
    return content


def _size(files: Files, location: Location, name: str, facts: Mapping[str, FileFacts]) -> int:
    if facts:
        if name not in facts:
            raise PlanError(f"{format_raw(name)} is not a file that the manifest lists")
        return facts[name].size  # compared with the file when the manifest was read
    try:
        return files.size(join(location, name))
    except OSError as error:
        raise PlanError(f"{format_raw(name)}, a file of tensors: {error.strerror or error}") from error


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
