"""The door to Hugging Face, inwards: their weights into a run, or into a checkpoint of ours. `hf_export` goes outwards.

Nothing is permuted or transposed, only renamed: both sides turn the two halves of a head against each other. What is
called how arrives as an argument (`HfTensorNames`), so that this room knows no model. Tensors are read one at a time,
and a rank reads no more of one than it holds.
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

MISSING, SURPLUS = "the model needs tensors that are not there:", "tensors that the model has no place for:"
RESHAPED = "shapes differ:"
NAME_SHOWN = 200  # characters of a tensor's name; a file may hold any
MODEL = "model."  # what DCP's names of weights begin with


class HfTensorNames(Protocol):
    """The tensors of one model on both sides; `models.registry.hf_names` gives it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor of the whole model, by our names."""

    def hf_name(self, name: str) -> str:
        """Hugging Face's name for one of ours."""

    def is_optional(self, name: str) -> bool:
        """Whether their files may hold this though the model does not need it."""

    def config_differences(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        """Where their `config.json` describes another model."""


def read_hf(
    location: Location,
    tensors: Mapping[str, torch.Tensor],
    names: HfTensorNames,
    group: dist.ProcessGroup | None,
    *,
    allow_change: bool = False,
) -> dict[str, Any]:
    """Fill this rank's tensors, plain ones or DTensors of any layout, by our names, from Hugging Face weights.
    What their `config.json` says.

    Each rank reads the slices that it holds; dtypes are converted on the way. Call on all ranks. Raises UserError on
    every rank where names, shapes or `config.json` do not fit the model; `allow_change` passes what `config.json` says
    (another base of the rotary frequencies, say), never names and shapes."""

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
    """Make `step-0` of a checkpoint folder from Hugging Face weights, in their dtypes or another; its name.

    One process alone. Raises UserError where names or shapes do not fit the model, or the folder is not empty;
    CheckpointError where it cannot be written, and then nothing of it is left."""
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
    """Makes each tensor when its turn to be written comes."""

    refused: UserError | None = None  # what ended it, if the user can mend it; DCP would wrap it up

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
    """Write a checkpoint of tensors that are made one at a time; the SHA-256 of its files by name."""
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
    if failure is not None:  # raised out here: `refused` is among the causes of what was caught
        raise failure
    return {os.path.basename(path): digest for path, digest in files.hashes.items()}


def _held(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    held = tensor.to_local().detach()
    if tuple(held.shape) != tuple(shape):
        raise RuntimeError(f"a shard of shape {tuple(held.shape)} where {tuple(shape)} was expected")
    return held, tuple(offset)


def refuse_other_names(source: HfFolder, names: HfTensorNames, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where a folder has not exactly the model's tensors, or another shape for one that is wanted."""
    theirs = {names.hf_name(name) for name in names.shapes}
    missing = sorted(theirs - source.names)
    surplus = sorted(name for name in source.names - theirs if not names.is_optional(name))
    shapes = {names.hf_name(name): shape for name, shape in wanted.items()}
    there = source.entries(sorted(shapes.keys() & source.names))
    reshaped = [
        f"{name}: {list(entry.shape)} there, {list(shapes[name])} here"
        for name, entry in there.items()
        if entry.shape != shapes[name]
    ]
    fix = "take the folder of the model that is configured, or set model.flavor and its sizes to those of the folder"
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
    """One UserError of all that does not fit, if anything."""
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
    """UserError where `out` is a file, or a folder that holds anything `but` what an earlier attempt left."""
    files = files_at(out)
    if files.is_file(out) or set(files.names(out)) - {but}:
        what = "is there already, and is not empty"
        raise UserError(Problem(str(out), what, fix="name a folder that does not exist yet, or remove this one"))


def refuse_lack_of_space(out: Location, entries: Iterable[TensorInfo]) -> None:
    """UserError before an hour of writing, not after it. Of an object store nobody knows its room."""
    if not files_at(out).renames:
        return
    path = local(out).absolute()
    free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    needed = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    if needed > free:
        what = f"{format_bytes(needed)} are to be written, and {format_bytes(free)} are free there"
        raise UserError(Problem(str(out), what, fix="make room, name another place, or take a smaller dtype"))


def check_float16_range(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor; float16 ends at 65504, and weights beyond would silently become infinite."""
    if tensor.dtype == torch.float16 and not tensor.isfinite().all():
        raise UserError(Problem(name, "holds values that float16 has no room for", fix="take bfloat16 or float32"))
    return tensor
