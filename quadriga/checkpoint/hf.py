"""Imports Hugging Face weights, into a run or into a checkpoint. `hf_export` is the reverse.

Tensors are only renamed, not permuted or transposed, because both programs rotate the two halves of a head. The names
are an argument (`HfTensorNames`), so that this package does not depend on a model. Tensors are read one at a time, and
a rank reads only its own shard of each.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.files import Location, files_at, local
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.hf_folder import HfFolder, TensorInfo
from quadriga.checkpoint.messages import mismatches
from quadriga.checkpoint.ranks import on_all_ranks
from quadriga.checkpoint.tensors import CheckpointWriter, HashingFiles, convert_dcp_errors
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.log import logger
from quadriga.units import format_bytes

MISSING, SURPLUS = "tensors of the model are missing:", "tensors that the model does not have:"
RESHAPED = "shapes differ:"
NAME_SHOWN = 200  # characters of a tensor's name, which can have any length in a file
MODEL = "model."  # prefix of DCP's names of weights


class HfTensorNames(Protocol):
    """Maps the tensors of one model to Hugging Face's names; see `models.registry.hf_names`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor of the whole model, by Quadriga's names."""

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of a tensor."""

    def is_optional(self, name: str) -> bool:
        """Whether Hugging Face's files can have this tensor although the model does not need it."""

    def config_differences(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        """The differences between the model of a `config.json` and this model."""


def read_hf(
    location: Location,
    tensors: Mapping[str, torch.Tensor],
    names: HfTensorNames,
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
    source: HfFolder, folder: Location, names: HfTensorNames, extra: Mapping[str, Any], dtype: torch.dtype | None = None
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


class _StreamingPlanner(DefaultSavePlanner):
    """Makes each tensor when it is written."""

    refused: UserError | None = None  # the UserError that ended the save, because DCP would wrap it

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        try:
            return self._make(index.fqn.removeprefix(MODEL))
        except UserError as error:
            self.refused = error
            raise


def _write_one_by_one(
    location: Location, wanted: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor]
) -> dict[str, str]:
    """Writes a checkpoint of tensors that are made one at a time. Returns the SHA-256 of its files by name."""
    files, planner = HashingFiles(files_at(location)), _StreamingPlanner(make)
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


def refuse_other_names(source: HfFolder, names: HfTensorNames, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if a folder does not have exactly the model's tensors, or if a shape in `wanted` differs."""
    theirs = {names.hf_name(name) for name in names.shapes}
    missing = sorted(theirs - source.names)
    surplus = sorted(name for name in source.names - theirs if not names.is_optional(name))
    shapes = {names.hf_name(name): shape for name, shape in wanted.items()}
    there = source.entries(sorted(shapes.keys() & source.names))
    reshaped = [
        f"{name}: {list(entry.shape)} in the folder, {list(shapes[name])} in the model"
        for name, entry in there.items()
        if entry.shape != shapes[name]
    ]
    fix = "use the folder of the configured model, or set model.flavor and its sizes to those of the folder"
    guess = nearest(missing[0], [name for name in surplus if len(name) < NAME_SHOWN]) if missing else None
    refuse_mismatch(str(source.path), missing, surplus, reshaped, fix, guess)


def refuse_mismatch(
    where: str,
    missing: Sequence[str],
    surplus: Sequence[str],
    reshaped: Sequence[str],
    fix: str,
    guess: str | None = None,
) -> None:
    """Raises one UserError with all mismatches, if there are any."""
    missing, surplus, reshaped = (
        [shortened(one, NAME_SHOWN) for one in names] for names in (missing, surplus, reshaped)
    )
    problems = [
        *(replace(problem, nearest=guess) for problem in mismatches(where, [(MISSING, missing)], fix)),
        *mismatches(where, [(SURPLUS, surplus), (RESHAPED, reshaped)], fix),
    ]
    if problems:
        raise UserError(*problems)


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
    needed = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    if needed > free:
        what = f"{format_bytes(needed)} of space are needed, and {format_bytes(free)} are free"
        raise UserError(Problem(str(out), what, fix="free some space, use another folder, or a smaller dtype"))


def check_float16_range(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the tensor. Raises UserError for infinite float16 values: a conversion to float16 makes values above
    65504 infinite without an error."""
    if tensor.dtype == torch.float16 and not tensor.isfinite().all():
        raise UserError(Problem(name, "has values outside the range of float16", fix="use bfloat16 or float32"))
    return tensor
