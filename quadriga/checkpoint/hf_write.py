"""A folder of Hugging Face weights, as it is written: how tensors are dealt to files, and the bytes of a file.

A safetensors file is the length of its header (8 bytes), the header as JSON, and the tensors one behind the other. The
library's own writer wants all tensors of a file in memory; here the header is made from shapes alone and the tensors
follow one at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch

from quadriga.checkpoint.hf_folder import FORMATS, SINGLE, TensorInfo

HEADER_STEP = 8  # bytes that the header's length is a multiple of, so that the tensors behind it are aligned
CHUNK_BYTES = 1 << 26  # bytes handed over at a time
FORMAT_NAMES = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class WeightFile:
    """One file of weights, before it is written. `tensors`: by the names in the file, in its order."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(map(tensor_bytes, self.tensors.values()))


def tensor_bytes(entry: TensorInfo) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def assign_to_files(tensors: Mapping[str, TensorInfo], most: int) -> list[WeightFile]:
    """The files for these tensors, in their order: as much in one as stays below `most` bytes, at least one tensor."""
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
    """What `model.safetensors.index.json` says."""
    entries = [entry for file in files for entry in file.tensors.values()]
    numbers = sum(math.prod(entry.shape) for entry in entries)
    return {
        "metadata": {"total_parameters": numbers, "total_size": sum(map(tensor_bytes, entries))},
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }


def write_weights(stream: IO[bytes], file: WeightFile, tensor: Callable[[str], torch.Tensor]) -> None:
    """Write a file; `tensor` makes each by its name, in the shape and format of its entry, when its turn comes."""
    ordered = sorted(file.tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps all of them aligned
    stream.write(_header(dict(ordered)))
    for name, entry in ordered:
        value = tensor(name)
        if (tuple(value.shape), value.dtype) != (entry.shape, entry.dtype):
            raise ValueError(f"{name} was announced as {entry} and is {tuple(value.shape)} of {value.dtype}")
        for piece in _bytes_of(value):
            stream.write(piece)


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
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
