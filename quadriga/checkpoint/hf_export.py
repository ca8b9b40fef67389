"""Exports a published checkpoint to Hugging Face: a folder that `transformers` loads.

Each tensor is read from the checkpoint when it is written, so one tensor at a time is in memory, not the model. With
several ranks, each writes some of the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from quadriga.checkpoint.files import Files, Location, files_at, local
from quadriga.checkpoint.folder import CheckpointInfo, join
from quadriga.checkpoint.hf import (
    MODEL,
    HfTensorNames,
    check_float16_range,
    refuse_existing,
    refuse_lack_of_space,
    refuse_mismatch,
)
from quadriga.checkpoint.hf_folder import CONFIG, INDEX, TensorInfo
from quadriga.checkpoint.hf_write import WeightFile, assign_to_files, index_of, write_weights
from quadriga.checkpoint.ranks import on_all_ranks
from quadriga.checkpoint.stored import StoredTensors, open_stored
from quadriga.checkpoint.tensors import load_tensor
from quadriga.log import logger
from quadriga.units import format_bytes

MOST_IN_A_FILE = 2 * 10**9  # bytes


def export_hf(
    checkpoint: CheckpointInfo,
    out: Location,
    names: HfTensorNames,
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

    def write_files() -> None:
        for file in parts[rank::ranks]:
            files.retried(partial(_write, files, join(location, file.name), file, weights.read))
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

    def __init__(self, stored: StoredTensors, names: HfTensorNames, dtype: torch.dtype | None) -> None:
        """Raises UserError if the checkpoint is of another model than `names`."""
        self._stored = stored
        saved = {
            name.removeprefix(MODEL): TensorInfo(planned.shape, planned.dtype)
            for name, planned in stored.plan.tensors.items()
            if name.startswith(MODEL)
        }
        refuse_other_model(stored.location, names.shapes, saved)
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


def refuse_other_model(location: str, shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, TensorInfo]) -> None:
    """Raises UserError if a checkpoint does not have exactly the tensors of a model."""
    reshaped = [
        f"{name}: {list(entry.shape)} in the checkpoint, {list(shapes[name])} in the model"
        for name, entry in saved.items()
        if name in shapes and entry.shape != shapes[name]
    ]
    missing, surplus = sorted(shapes.keys() - saved.keys()), sorted(saved.keys() - shapes.keys())
    refuse_mismatch(
        location, missing, surplus, reshaped, "give the configuration that it was saved with: --config FILE.toml"
    )


def _write(files: Files, path: str, file: WeightFile, tensor: Callable[[str], torch.Tensor]) -> None:
    with files.create(path) as stream:
        write_weights(stream, file, tensor)


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
