"""Exports a published checkpoint to Hugging Face: a folder that `transformers` loads. `hf` is the reverse.

Each tensor is read from the checkpoint when it is written, so one tensor at a time is in memory, not the model. With
several ranks, each writes some of the files.

A safetensors file is the length of its header (8 bytes), the header as JSON, and the tensors one after another. The
writer of the library needs all tensors of a file in memory. Here the header is made from the shapes, and the tensors
are written one at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist

from quadriga.checkpoint.files import Files, Location, files_at, join, local
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.hf_folder import FORMATS, TensorInfo
from quadriga.checkpoint.hf_headers import CONFIG, INDEX, SINGLE, refuse_mismatch
from quadriga.checkpoint.messages import compare_shapes
from quadriga.checkpoint.ranks import on_all_ranks
from quadriga.checkpoint.stored import StoredTensors, load_tensor, open_stored
from quadriga.errors import Problem, UserError
from quadriga.log import logger
from quadriga.units import format_bytes, grouped

MODEL = "model."  # prefix of DCP's names of weights
MOST_IN_A_FILE = 2 * 10**9  # bytes
HEADER_STEP = 8  # bytes; the length of the header is a multiple, so that the tensors are aligned
CHUNK_BYTES = 1 << 26  # bytes written at a time
FORMAT_NAMES = {dtype: name for name, dtype in FORMATS.items()}


def export_hf(
    checkpoint: CheckpointInfo,
    out: Location,
    names: TensorNames,
    config: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    replace: bool = False,
    most: int = MOST_IN_A_FILE,
) -> None:
    """Writes the weights of a published checkpoint as safetensors of at most `most` bytes per file, with their index,
    `config.json` and the tokenizer's files.

    On a file system, everything is written under a hidden name next to `out` and then renamed. On an object store,
    `config.json` is written last. Call on all ranks.

    Args:
        config: the fields of `config.json`, except the dtype, which is added.
        dtype: None keeps the saved dtypes.
        tokenizer: the contents of the tokenizer's files by name; None: no tokenizer.
        replace: replaces an existing `out`; otherwise it is refused.

    Raises:
        UserError, CheckpointError: on every rank. `out` is then unchanged.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    files = files_at(out)
    location = _hidden(out) if files.renames else str(out)

    def begin() -> HfWeights:
        held = HfWeights(stored, names, dtype)
        if rank == 0:
            if not replace:
                refuse_existing(out)
            refuse_lack_of_space(out, held.entries.values())
            _remove(files, location)
            files.make(location)
        return held

    def write_file(file: WeightFile) -> None:
        with files.create(join(location, file.name)) as stream:
            write_weights(stream, file, weights.read)

    def write_files() -> None:
        for file in parts[rank::ranks]:
            files.retried(partial(write_file, file))
            logger.info(f"wrote {file.name}: {format_bytes(file.size)}, {len(file.tensors)} tensors")

    def finish() -> None:
        if rank == 0:
            _write_metadata(files, location, parts, {**config, "torch_dtype": weights.dtype_name}, tokenizer or {})
            _publish(files, location, str(out))

    try:
        stored = open_stored(checkpoint.location or checkpoint.path, group, checkpoint.files)
        weights = on_all_ranks(group, begin)
        parts = assign_to_files(weights.entries, most)
        on_all_ranks(group, write_files)
        on_all_ranks(group, finish)
    except BaseException:
        if rank == 0 and files.renames:
            with suppress(OSError):
                _remove(files, location)
        raise


class HfWeights:
    """The weights of a checkpoint by Hugging Face's names. The plan is read once, the tensors one at a time."""

    def __init__(self, stored: StoredTensors, names: TensorNames, dtype: torch.dtype | None) -> None:
        """Raises UserError if the checkpoint is of another model than `names`."""
        self._stored = stored
        saved = {
            name.removeprefix(MODEL): TensorInfo(planned.shape, planned.dtype)
            for name, planned in stored.plan.tensors.items()
            if name.startswith(MODEL)
        }
        differences = compare_shapes(names.shapes, {name: entry.shape for name, entry in saved.items()}, "checkpoint")
        fix = "give the configuration that it was saved with: --config FILE.toml"
        refuse_mismatch(stored.location, *differences, fix)
        self._ours = {names.hf_name(name): name for name in names.shapes}
        self.entries = {
            theirs: TensorInfo(saved[name].shape, dtype or saved[name].dtype) for theirs, name in self._ours.items()
        }

    @property
    def dtype_name(self) -> str:
        """The dtype of most of the written tensors, as named in `config.json`."""
        dtypes = [entry.dtype for entry in self.entries.values()]
        return str(max(dtypes, key=dtypes.count)).removeprefix("torch.")

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor in the dtype of the export. In addition, only one saved chunk of it is in memory."""
        return check_float16_range(load_tensor(self._stored, MODEL + self._ours[name], self.entries[name].dtype), name)


def _write_metadata(
    files: Files, location: str, weights: list[WeightFile], config: Mapping[str, Any], tokenizer: Mapping[str, bytes]
) -> None:
    if len(weights) > 1:
        files.write(join(location, INDEX), _as_json(index_of(weights)))
    for name, content in tokenizer.items():
        files.write(join(location, name), content)
    files.write(join(location, CONFIG), _as_json(config))  # last, because transformers reads nothing without it


def _publish(files: Files, location: str, out: str) -> None:
    if not files.renames:
        return
    files.flush_names(location)
    _remove(files, out)  # it is empty, or is to be replaced
    files.rename(location, out)
    files.flush_names(local(out).absolute().parent)


def _hidden(out: Location) -> str:
    path = local(out).absolute()
    return str(path.with_name(f".{path.name}.saving"))


def _remove(files: Files, location: Location) -> None:
    if files.exists(location):
        files.remove(location)


def _as_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


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
    groups = [dict(group) for group in grouped(tensors.items(), lambda item: tensor_bytes(item[1]), most)]
    if len(groups) <= 1:
        return [WeightFile(SINGLE, groups[0] if groups else {})]
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


def refuse_existing(out: Location, but: str = "") -> None:
    """Raises UserError if `out` is a file, or a folder with anything except `but`, the rest of an earlier attempt."""
    files = files_at(out)
    if files.is_file(out) or set(files.names(out)) - {but}:
        what = "already exists, and is not empty"
        raise UserError(Problem(str(out), what, fix="use a folder that does not exist yet, or remove this one"))


def refuse_lack_of_space(out: Location, entries: Iterable[TensorInfo]) -> None:
    """Raises UserError if the disk has too little free space, before the write starts. Does not check object stores."""
    if not files_at(out).renames:
        return
    path = local(out).absolute()
    free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    needed = sum(map(tensor_bytes, entries))
    if needed > free:
        what = f"{format_bytes(needed)} of space are needed, and {format_bytes(free)} are free"
        raise UserError(Problem(str(out), what, fix="free some space, use another folder, or a smaller dtype"))


def check_float16_range(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the tensor. Raises UserError for infinite float16 values: a conversion to float16 makes values above
    65504 infinite without an error."""
    if tensor.dtype == torch.float16 and not tensor.isfinite().all():
        raise UserError(Problem(name, "has values outside the range of float16", fix="use bfloat16 or float32"))
    return tensor
