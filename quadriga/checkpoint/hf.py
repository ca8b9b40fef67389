"""The door to Hugging Face, inwards: their weights into a run, or into a checkpoint of ours. `hf_export` goes outwards.

Nothing is permuted or transposed, only renamed: both sides turn the two halves of a head against each other. What is
called how arrives as an argument (`Names`), so that this room knows no model. Tensors are read one at a time, and a
rank reads no more of one than it holds.
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
from quadriga.checkpoint.files import Place, files_at, local
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.hf_folder import Entry, HfFolder
from quadriga.checkpoint.messages import misfits
from quadriga.checkpoint.ranks import together
from quadriga.checkpoint.tensors import HashingFiles, Writer, plain_errors
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.log import logger
from quadriga.units import show_bytes

MISSING, SURPLUS = "the model needs tensors that are not there:", "tensors that the model has no place for:"
RESHAPED = "shapes differ:"
NAME_SHOWN = 200  # characters of a tensor's name; a file may hold any
MODEL = "model."  # what DCP's names of weights begin with


class Names(Protocol):
    """The tensors of one model on both sides; `models.registry.hf_names` gives it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor of the whole model, by our names."""

    def theirs(self, name: str) -> str:
        """Hugging Face's name for one of ours."""

    def is_spare(self, name: str) -> bool:
        """Whether their files may hold this though the model does not need it."""

    def unlike(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        """Where their `config.json` describes another model."""


def read_hf(
    place: Place,
    tensors: Mapping[str, torch.Tensor],
    names: Names,
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
        source = HfFolder(place)
        config = source.config()
        if (unlike := names.unlike(config, source.config_file)) and not allow_change:
            raise UserError(*unlike)
        for problem in unlike:
            logger.warning(f"{problem.where}: {problem.what}; checkpoint.allow_change is set")
        refuse_other_names(source, names, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        by_theirs = {names.theirs(name): tensor for name, tensor in tensors.items()}
        for name in source.in_file_order(by_theirs):
            held, offset = _held(by_theirs[name])
            if held.numel():
                source.fill(name, held, offset)
        return config

    return together(group, fill)


def import_hf(
    source: HfFolder, folder: Place, names: Names, extra: Mapping[str, Any], dtype: torch.dtype | None = None
) -> str:
    """Make `step-0` of a checkpoint folder from Hugging Face weights, in their dtypes or another; its name.

    One process alone. Raises UserError where names or shapes do not fit the model, or the folder is not empty;
    CheckpointError where it cannot be written, and then nothing of it is left."""
    refuse_what_is_there(folder, but=os.path.basename(folders.hidden(folder, 0)))
    refuse_other_names(source, names, names.shapes)
    entries = source.entries(map(names.theirs, names.shapes))
    wanted = {name: Entry(shape, dtype or entries[names.theirs(name)].dtype) for name, shape in names.shapes.items()}
    refuse_lack_of_room(folder, wanted.values())

    def make(name: str) -> torch.Tensor:
        tensor = torch.empty(wanted[name].shape, dtype=wanted[name].dtype)
        source.fill(names.theirs(name), tensor, (0,) * tensor.dim())
        return that_fits(tensor, names.theirs(name))

    place = folders.prepare(folder, 0)
    try:
        hashes = _write_one_by_one(place, wanted, make)
        return folders.publish(folder, 0, ("model",), extra, place, hashes)
    except BaseException:
        files_at(folder).remove(place)
        raise


class _OneByOne(DefaultSavePlanner):
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


def _write_one_by_one(place: Place, wanted: Mapping[str, Entry], make: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """Write a checkpoint of tensors that are made one at a time; the SHA-256 of its files by name."""
    files, planner = HashingFiles(files_at(place)), _OneByOne(make)
    writer = Writer(str(place), files)
    writer.single_file_per_rank = False  # DCP keeps every tensor of a file until the file is done
    promised = {
        MODEL + name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in wanted.items()
    }
    failure: Exception | None = None
    try:
        with plain_errors(f"{place} could not be written"):
            save(promised, storage_writer=writer, planner=planner, no_dist=True)
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


def refuse_other_names(source: HfFolder, names: Names, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where a folder has not exactly the model's tensors, or another shape for one that is wanted."""
    theirs = {names.theirs(name) for name in names.shapes}
    missing = sorted(theirs - source.names)
    surplus = sorted(name for name in source.names - theirs if not names.is_spare(name))
    shapes = {names.theirs(name): shape for name, shape in wanted.items()}
    there = source.entries(sorted(shapes.keys() & source.names))
    reshaped = [
        f"{name}: {list(entry.shape)} there, {list(shapes[name])} here"
        for name, entry in there.items()
        if entry.shape != shapes[name]
    ]
    fix = "take the folder of the model that is configured, or set model.flavor and its sizes to those of the folder"
    guess = nearest(missing[0], [name for name in surplus if len(name) < NAME_SHOWN]) if missing else None
    refuse(str(source.path), missing, surplus, reshaped, fix, guess)


def refuse(
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
        *(replace(problem, nearest=guess) for problem in misfits(where, [(MISSING, missing)], fix)),
        *misfits(where, [(SURPLUS, surplus), (RESHAPED, reshaped)], fix),
    ]
    if problems:
        raise UserError(*problems)


def refuse_what_is_there(out: Place, but: str = "") -> None:
    """UserError where `out` is a file, or a folder that holds anything `but` what an earlier attempt left."""
    files = files_at(out)
    if files.is_file(out) or set(files.names(out)) - {but}:
        what = "is there already, and is not empty"
        raise UserError(Problem(str(out), what, fix="name a folder that does not exist yet, or remove this one"))


def refuse_lack_of_room(out: Place, entries: Iterable[Entry]) -> None:
    """UserError before an hour of writing, not after it. Of an object store nobody knows its room."""
    if not files_at(out).renames:
        return
    path = local(out).absolute()
    free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    needed = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    if needed > free:
        what = f"{show_bytes(needed)} are to be written, and {show_bytes(free)} are free there"
        raise UserError(Problem(str(out), what, fix="make room, name another place, or take a smaller dtype"))


def that_fits(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor; float16 ends at 65504, and weights beyond would silently become infinite."""
    if tensor.dtype == torch.float16 and not tensor.isfinite().all():
        raise UserError(Problem(name, "holds values that float16 has no room for", fix="take bfloat16 or float32"))
    return tensor
