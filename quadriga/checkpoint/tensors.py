"""Tensors to and from a folder by `torch.distributed.checkpoint`: each rank writes and reads what it holds.

A mapping is flat, name to tensor; sharded tensors are DTensors. With `group` None this is one process alone. The
group should be one of gloo and of no other use: planning sends small objects between ranks while training may be
using the other groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from quadriga.checkpoint.folder import CheckpointError
from quadriga.errors import Problem, UserError

Tensors = Mapping[str, torch.Tensor]
SHOWN = 5  # of many problems alike


def write(folder: Path, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Write all ranks' tensors into an empty folder, flushed to the disk. Raises the same error on every rank."""
    writer = _Writer(folder, sync_files=True)
    with _plain_errors(f"{folder} could not be written"):
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


class _Writer(FileSystemWriter):
    """When a disk is full, torch.save ends in an error about its own positions, or in one that names no file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            file = f"{self.path}/{plan.storage_data.prefix}*"
            raise OSError(cause.errno, cause.strerror, file) from error


def read(folder: Path, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors in place from a folder, whatever layout wrote it.

    `tensors` must name exactly what the folder holds under the same first words (`model.`, `optimizer.`): a name that
    is missing on either side, or another shape, raises UserError on every rank.
    """
    reader = FileSystemReader(folder)
    with _plain_errors(f"{folder} could not be read"):
        _refuse_other_tensors(folder, tensors, reader.read_metadata().state_dict_metadata, group)
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)


def snapshot(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Copies in host memory, which training cannot change while they are written."""
    return {
        name: value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")
        for name, value in tensors.items()
    }


def _refuse_other_tensors(
    folder: Path, tensors: Tensors, stored: Mapping[str, Any], group: dist.ProcessGroup | None
) -> None:
    parts = {name.split(".", 1)[0] for name in tensors}
    known = sorted(name for name in stored if name.split(".", 1)[0] in parts)
    missing = [name for name in tensors if name not in stored]
    reshaped = []
    for name in tensors.keys() & stored.keys():
        entry = stored[name]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensors[name].shape:
            reshaped.append(f"{name}: {list(getattr(entry, 'size', []))} saved, {list(tensors[name].shape)} here")
    wanted = torch.tensor([name in tensors for name in known], dtype=torch.uint8)
    gathered: list[Any] = [(missing, reshaped)]
    if group is not None:  # with pipeline stages each rank holds some of the names
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=group)
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (missing, reshaped), group=group)
    missing = sorted({name for one, _ in gathered for name in one})
    reshaped = sorted({name for _, one in gathered for name in one})
    surplus = [name for name, is_wanted in zip(known, wanted.tolist(), strict=True) if not is_wanted]
    kinds = (
        ("the checkpoint lacks", missing),
        ("only the checkpoint has", surplus),
        ("shapes differ:", reshaped),
    )
    problems = [
        Problem(
            where=str(folder),
            what=f"{kind} {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)),
            fix="start with the configuration that saved it, or with another job.dump_folder",
        )
        for kind, names in kinds
        if names
    ]
    if problems:
        raise UserError(*problems)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """One CheckpointError with each failed rank's own words; no warning that one process is alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            lines = [f"rank {rank}: {_in_words(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
            raise CheckpointError("\n".join([what, *lines])) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{what}\n{_in_words(error)}") from error


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
