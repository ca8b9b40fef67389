"""Writes a folder of Hugging Face weights: how tensors are assigned to files, and the bytes of a file.

A safetensors file is the length of its header (8 bytes), the header as JSON, and the tensors one after another. The
writer of the library needs all tensors of a file in memory. Here the header is made from the shapes, and the tensors
are written one at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch

from quadriga.checkpoint.hf_folder import FORMATS, SINGLE, TensorInfo

HEADER_STEP = 8  # bytes; the length of the header is a multiple, so that the tensors are aligned
CHUNK_BYTES = 1 << 26  # bytes written at a time
FORMAT_NAMES = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class WeightFile:
    """The content of one file of weights. `tensors`: by name, in the order of assignment."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(map(tensor_bytes, self.tensors.values()))


def tensor_bytes(entry: TensorInfo) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def assign_to_files(tensors: Mapping[str, TensorInfo], most: int) -> list[WeightFile]:
    """The files for these tensors, in their order. A file has at most `most` bytes, or a single larger tensor."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, entry in tensors.items():
        if groups[-1] and filled + tensor_bytes(entry) > most:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += tensor_bytes(entry)
    if len(groups) == 1:
        return [WeightFile(SINGLE, groups[0])]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [WeightFile(name, group) for name, group in zip(names, groups, strict=True)]


def index_of(files: Sequence[WeightFile]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    entries = [entry for file in files for entry in file.tensors.values()]
    numbers = sum(math.prod(entry.shape) for entry in entries)
    return {
        "metadata": {"total_parameters": numbers, "total_size": sum(map(tensor_bytes, entries))},
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }


def write_weights(stream: IO[bytes], file: WeightFile, tensor: Callable[[str], torch.Tensor]) -> None:
    """Writes a file. `tensor` returns each tensor by its name, in the shape and dtype of its entry, when it is written.

    Raises ValueError if it returns another shape or dtype."""
    ordered = sorted(file.tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps all tensors aligned
    stream.write(_header(dict(ordered)))
    for name, entry in ordered:
        value = tensor(name)
        if (tuple(value.shape), value.dtype) != (entry.shape, entry.dtype):
            raise ValueError(f"{name} is {entry} in the header and {tuple(value.shape)} of {value.dtype} as a tensor")
        for piece in _bytes_of(value):
            stream.write(piece)


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires this
    end = 0
    for name, entry in tensors.items():
        start, end = end, end + tensor_bytes(entry)
        header[name] = {"dtype": FORMAT_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_STEP)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: torch.Tensor) -> Iterator[memoryview]:
    for piece in value.detach().contiguous().view(-1).view(torch.uint8).split(CHUNK_BYTES):
        yield memoryview(piece.numpy())
