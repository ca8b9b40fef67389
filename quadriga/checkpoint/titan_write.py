"""Converts a checkpoint to the format of torchtitan v0.2, whose trainer can resume from the result.

torch.distributed.checkpoint writes it, from tensors without memory. Each tensor is read from the checkpoint when it is
written, and the rows of query and key matrices and of their moments are reordered for torchtitan. Only the content of
one file is in memory.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from quadriga.checkpoint.files import Location, files_at, is_url, local
from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo, published_path, staging_path
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.hf_export import refuse_lack_of_space
from quadriga.checkpoint.hf_folder import TensorInfo
from quadriga.checkpoint.load import halves_to_interleaved, parameter_name
from quadriga.checkpoint.plan import PlannedTensor
from quadriga.checkpoint.stored import StoredTensors, load_tensor, open_stored
from quadriga.checkpoint.tensors import StreamingPlanner, convert_dcp_errors
from quadriga.checkpoint.titan import MODEL, MOMENTS, OPTIMIZER, refuse_other_titan_model, titan_name
from quadriga.errors import Problem, UserError
from quadriga.units import grouped

IN_A_FILE = 2 * 10**9  # bytes per file, except for a larger tensor


def export_titan(
    checkpoint: CheckpointInfo,
    out: Location,
    names: TensorNames,
    states: Mapping[str, Any],
    group: Mapping[str, Any],
) -> str:
    """Writes a published checkpoint as `step-N` of a checkpoint folder of torchtitan. Returns its name. Single process.

    Args:
        states: the other top-level entries: `train_state`, `lr_scheduler`, `dataloader`; omitted if the checkpoint has
            only the weights.
        group: the fields of the only parameter group of torchtitan's optimizer, which are saved for each parameter.

    Raises:
        UserError: the folder cannot be used, or the checkpoint is not of this model.
        CheckpointError: it is damaged, or cannot be written; then nothing of it is left.
    """
    if is_url(out):
        raise UserError(Problem(str(out), "torchtitan reads checkpoints from a folder", fix="use a folder"))
    name, location, files = published_path(out, checkpoint.step), staging_path(out, checkpoint.step), files_at(out)
    if files.exists(name):
        fix = "use another folder, or remove this one"
        raise UserError(Problem(name, "already exists", fix=fix))
    stored = open_stored(checkpoint.location or checkpoint.path, None, checkpoint.files)
    saved = {titan_name(ours): planned for ours, planned in _wanted(stored, checkpoint)}
    whole = "optimizer" in checkpoint.contents
    parts, moments = ("model", "optimizer") if whole else ("model",), MOMENTS if whole else ()
    refuse_other_titan_model(
        stored.location, {one: planned.shape for one, planned in saved.items()}, names, parts, moments
    )
    refuse_lack_of_space(out, [TensorInfo(planned.shape, planned.dtype) for planned in saved.values()])
    if files.exists(location):
        files.remove(location)
    files.make(location)
    theirs = {titan_name(ours): ours for ours in stored.plan.tensors if ours.startswith((MODEL, OPTIMIZER))}

    def make(name: str) -> torch.Tensor | None:
        if name not in theirs:
            return None
        tensor = load_tensor(stored, theirs[name])
        head = names.paired_rows(parameter_name(name)) if tensor.dim() else 0
        return halves_to_interleaved(tensor, head) if head else tensor

    try:
        planner = StreamingPlanner(make)
        with convert_dcp_errors(f"{name} could not be written"):
            save(_state_dict(saved, states, group), storage_writer=_Writer(location), planner=planner, no_dist=True)
        files.flush_names(location)
        files.rename(location, name)
        files.flush_names(local(out))
    except BaseException as error:
        with suppress(OSError):
            files.remove(location)
        if isinstance(error, OSError):
            raise CheckpointError(f"{name} could not be written: {error.strerror or error}") from error
        raise
    return name


def _wanted(stored: StoredTensors, checkpoint: CheckpointInfo) -> Iterator[tuple[str, PlannedTensor]]:
    for name, planned in stored.plan.tensors.items():
        part = name.partition(".")[0]
        if part in ("model", "optimizer") and part in checkpoint.contents:
            yield name, planned


def _state_dict(
    saved: Mapping[str, PlannedTensor], states: Mapping[str, Any], group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict as torchtitan passes it to DCP, with tensors on the meta device as placeholders."""
    placeholders = {
        name: torch.empty(planned.shape, dtype=planned.dtype, device="meta") for name, planned in saved.items()
    }
    weights = {name: tensor for name, tensor in placeholders.items() if not name.startswith(OPTIMIZER)}
    moments = {
        name.removeprefix(OPTIMIZER): tensor for name, tensor in placeholders.items() if name.startswith(OPTIMIZER)
    }
    if not moments:
        return weights
    groups = {f"param_groups.{name}.{key}": value for name in weights for key, value in group.items()}
    return {**weights, "optimizer": {**moments, **groups}, **states}


class _Writer(FileSystemWriter):
    """Writes several files, because DCP keeps every tensor of a file in memory until the file is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: queue.Queue[tuple[Any, str, list[WriteItem]]] = queue.Queue()
        for number, items in enumerate(grouped(plan.items, _bytes_of, IN_A_FILE)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)


def _bytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    return data.size.numel() * data.properties.dtype.itemsize if data is not None else 0
