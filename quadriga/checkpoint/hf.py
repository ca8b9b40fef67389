"""Imports Hugging Face weights, into a run or into a checkpoint. `hf_export` is the reverse.

Tensors are only renamed, not permuted or transposed, because both programs rotate the two halves of a head. The names
are an argument (`TensorNames`), so that this package does not depend on a model. Tensors are read one at a time, and
a rank reads only its own shard of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.files import Location, files_at
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.hf_export import MODEL, check_float16_range, refuse_existing, refuse_lack_of_space
from quadriga.checkpoint.hf_folder import HfFolder, TensorInfo
from quadriga.checkpoint.hf_headers import refuse_other_names
from quadriga.checkpoint.ranks import on_all_ranks
from quadriga.checkpoint.tensors import CheckpointWriter, HashingFiles, StreamingPlanner, convert_dcp_errors
from quadriga.errors import UserError
from quadriga.log import logger


def read_hf(
    location: Location,
    tensors: Mapping[str, torch.Tensor],
    names: TensorNames,
    group: dist.ProcessGroup | None,
    *,
    allow_change: bool = False,
) -> dict[str, Any]:
    """Fills this rank's tensors, plain ones or DTensors of any layout, by Quadriga's names, from Hugging Face weights.
    Returns the content of `config.json`.

    Each rank reads its shards; dtypes are converted. Call on all ranks. Raises UserError on every rank if names, shapes
    or `config.json` do not fit the model. `allow_change` accepts differences of `config.json` (for example another base
    of the rotary frequencies), never of names and shapes."""

    def fill() -> dict[str, Any]:
        source = HfFolder(location)
        config = source.config()
        if (unlike := names.config_differences(config, source.config_file)) and not allow_change:
            raise UserError(*unlike)
        for problem in unlike:
            logger.warning(f"{problem.where}: {problem.what}; checkpoint.allow_change is set")
        refuse_other_names(source, names, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        by_theirs = {names.hf_name(name): tensor for name, tensor in tensors.items()}
        for name in source.in_file_order(by_theirs):
            held, offset = _held(by_theirs[name])
            if held.numel():
                source.fill(name, held, offset)
        return config

    return on_all_ranks(group, fill)


def import_hf(
    source: HfFolder, folder: Location, names: TensorNames, extra: Mapping[str, Any], dtype: torch.dtype | None = None
) -> str:
    """Writes Hugging Face weights as `step-0` of a checkpoint folder, in their dtypes or in `dtype`. Returns its name.

    Single process. Raises UserError if names or shapes do not fit the model, or if the folder is not empty;
    CheckpointError if it cannot be written. In both cases nothing of it is left."""
    refuse_existing(folder, but=os.path.basename(folders.staging_path(folder, 0)))
    refuse_other_names(source, names, names.shapes)
    entries = source.entries(map(names.hf_name, names.shapes))
    wanted = {
        name: TensorInfo(shape, dtype or entries[names.hf_name(name)].dtype) for name, shape in names.shapes.items()
    }
    refuse_lack_of_space(folder, wanted.values())

    def make(name: str) -> torch.Tensor:
        tensor = torch.empty(wanted[name].shape, dtype=wanted[name].dtype)
        source.fill(names.hf_name(name), tensor, (0,) * tensor.dim())
        return check_float16_range(tensor, names.hf_name(name))

    location = folders.prepare(folder, 0)
    try:
        hashes = _write_one_by_one(location, wanted, make)
        return folders.publish(folder, 0, ("model",), extra, location, hashes)
    except BaseException:
        files_at(folder).remove(location)
        raise


def _write_one_by_one(
    location: Location, wanted: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor]
) -> dict[str, str]:
    """Writes a checkpoint of tensors that are made one at a time. Returns the SHA-256 of its files by name."""
    files, planner = (
        HashingFiles(files_at(location)),
        StreamingPlanner(lambda name: make(name.removeprefix(MODEL)), flatten_state_dict=False),
    )
    writer = CheckpointWriter(str(location), files)
    writer.single_file_per_rank = False  # DCP keeps every tensor of a file until the file is done
    placeholders = {
        MODEL + name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in wanted.items()
    }
    failure: Exception | None = None
    try:
        with convert_dcp_errors(f"{location} could not be written"):
            save(placeholders, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointError as error:
        failure = planner.refused or error
    if failure is not None:  # raised here, because `refused` is among the causes of `error`
        raise failure
    return {os.path.basename(path): digest for path, digest in files.hashes.items()}


def _held(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's shard of a tensor, and its offsets in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    held = tensor.to_local().detach()
    if tuple(held.shape) != tuple(shape):
        raise RuntimeError(f"a shard of shape {tuple(held.shape)} where {tuple(shape)} was expected")
    return held, tuple(offset)
