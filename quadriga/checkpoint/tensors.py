"""Saves and loads tensors with `torch.distributed.checkpoint` (DCP): each rank writes and reads its shards.

Mappings are flat, from name to tensor; sharded tensors are DTensors. `group` None is a single process. The group should
be a gloo group without other use, because planning sends small objects between ranks while training can use the other
groups.

DCP writes its plan as a pickle, `.metadata`, for its own loads. A save also writes it as JSON (`plan.json`), which is
read here (`stored`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from quadriga.checkpoint.files import Files, Location, files_at
from quadriga.checkpoint.folder import CheckpointError, FileFacts, join
from quadriga.checkpoint.messages import mismatches
from quadriga.checkpoint.plan import PLAN_FILE, PlannedTensor, from_metadata
from quadriga.checkpoint.stored import StoredTensors, TensorPlanner, open_stored
from quadriga.errors import UserError, causes
from quadriga.json_collectives import all_gather_json
from quadriga.tensors import from_local_like, to_local

Tensors = Mapping[str, torch.Tensor]
COPIED_AHEAD = 10_000_000  # bytes that DCP copies ahead from the device


def save_tensors(
    location: Location, tensors: Tensors, group: dist.ProcessGroup | None, retries: int = 5
) -> dict[str, str]:
    """Writes all ranks' tensors to an empty place, durably. Returns the SHA-256 of this rank's files by name.

    Call on all ranks. Raises the same CheckpointError on every rank if any rank fails."""
    files = HashingFiles(files_at(location, retries))
    writer = CheckpointWriter(
        str(location), files, on_cuda=any(value.device.type == "cuda" for value in tensors.values())
    )
    with convert_dcp_errors(f"{location} could not be written"), _without_crc32():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    return {os.path.basename(path): digest for path, digest in files.hashes.items()}


def load_tensors(
    location: Location,
    tensors: Tensors,
    group: dist.ProcessGroup | None,
    *,
    facts: Mapping[str, FileFacts] | None = None,
    may_hold_more: bool = False,
    prefix: str = "",
    retries: int = 5,
    optional: str | None = None,
) -> tuple[list[str], list[str]]:
    """Fills the tensors in place from what `save_tensors` wrote on any layout. Call on all ranks.

    `tensors` must have exactly the names of the checkpoint with the same first words (`model.`, `optimizer.`). A name
    that only one side has (with `may_hold_more`: only `tensors`), or another shape, raises UserError on every rank.
    A damaged checkpoint, or one that differs from its plan, raises CheckpointError on every rank.

    Names that begin with `optional` can be missing on either side or have another shape; such tensors are unchanged.
    Returns the names of this rank that were not filled, and the unused names of the checkpoint that equal one of this
    rank up to the last point.

    Args:
        facts: the files in the manifest; None or empty without a manifest.
        prefix: of all names in `tensors`; the names in the checkpoint may lack it.
    """
    stored = open_stored(location, group, facts, retries)
    there = stored.plan.tensors
    if prefix and not all(name.startswith(prefix) for name in there):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    may_lack = {name for name in tensors.keys() | there.keys() if optional and name.startswith(optional)}
    unfilled = sorted(name for name in may_lack & tensors.keys() if not _fits(there.get(name), tensors[name]))
    beginnings = {name.rpartition(".")[0] for name in may_lack & tensors.keys()}
    unused = sorted(n for n in may_lack - tensors.keys() if n.rpartition(".")[0] in beginnings)
    wanted = {name: value for name, value in tensors.items() if name not in unfilled}
    due = {name: value for name, value in wanted.items() if name not in may_lack}
    expected = {name: entry for name, entry in there.items() if name not in may_lack}
    _refuse_other_tensors(str(location), due, expected, group, may_hold_more)
    with convert_dcp_errors(f"{location} could not be read"):
        load(
            wanted,
            storage_reader=stored.reader(wanted),
            planner=TensorPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    return unfilled, unused


def _fits(entry: PlannedTensor | None, value: torch.Tensor) -> bool:
    return entry is not None and entry.shape == tuple(value.shape)


def stored_tensors(location: Location, facts: Mapping[str, FileFacts] | None = None) -> dict[str, PlannedTensor]:
    """Shape, dtype and chunks of all tensors in a place, by name. Single process. Raises CheckpointError like
    `load_tensors`."""
    return open_stored(location, None, facts).plan.tensors


def load_tensor(stored: StoredTensors, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A whole tensor, in `dtype` or (None) its saved dtype. In addition, only one saved chunk is in memory.

    Can be called on a single rank. Raises CheckpointError if it is damaged."""
    planned = stored.plan.tensors[name]
    tensor = torch.empty(planned.shape, dtype=dtype or planned.dtype)
    reader, planner = stored.reader([name]), TensorPlanner()
    planner.set_up_planner({name: tensor}, reader.read_metadata(), is_coordinator=True)
    with convert_dcp_errors(f"{stored.location} could not be read"):
        reader.read_data(planner.create_local_plan(), planner).wait()
    return tensor


class Staging:
    """Copies tensors to host memory, so that training cannot change them during a save. The memory is reused.

    With `pinned` memory (on CUDA), the device copies directly, without the buffers of the driver.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned, self._copies = pinned, dict[str, torch.Tensor]()

    @torch.no_grad()
    def copy(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The copies, with the same dtypes and placements. They are valid until the next call."""
        for gone in self._copies.keys() - tensors.keys():
            del self._copies[gone]
        copies = {name: self._into_host(name, value.detach()) for name, value in tensors.items()}
        if self._pinned:
            torch.cuda.synchronize()
        return copies

    def _into_host(self, name: str, value: torch.Tensor) -> torch.Tensor:
        held = to_local(value)
        copy = self._copies.get(name)
        if copy is None or copy.shape != held.shape or copy.dtype != held.dtype:
            copy = self._copies[name] = torch.empty_like(held, device="cpu", pin_memory=self._pinned)
        copy.copy_(held, non_blocking=self._pinned)
        return from_local_like(copy, value)


class HashingFiles(FileSystemBase):
    """A file system for DCP that computes the SHA-256 of every file while it is written."""

    def __init__(self, files: Files) -> None:
        self.files, self.hashes = files, dict[str, str]()

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if "w" not in mode:
            with self.files.open(path, mode) as stream:
                yield stream
            return
        with self.files.create(path) as stream:
            hashed = _HashedStream(stream)
            yield hashed
        self.hashes[str(path)] = hashed.digest.hexdigest()

    def concat_path(self, path: Any, suffix: str) -> str:
        return join(path, suffix)

    def rename(self, path: Any, new_path: Any) -> None:
        self.hashes[str(new_path)] = self.hashes.pop(str(path))
        self.files.rename(path, new_path)

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None:
        self.files.make(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str)

    def exists(self, path: Any) -> bool:
        return self.files.exists(path)

    def rm_file(self, path: Any) -> None:
        self.files.remove(path)


class _HashedStream:
    """A sequential output stream with a hash. Has the methods that DCP and torch.save call."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


class CheckpointWriter(FileSystemWriter):
    """Writes `plan.json` in addition to DCP's files.

    Raises OSError with the file if a disk is full. torch.save would raise an error about its own positions, or without
    a file name."""

    def __init__(self, location: str, files: HashingFiles, on_cuda: bool = False) -> None:
        # Without CUDA tensors, nothing is copied ahead, because DCP would initialize CUDA on a machine with GPUs.
        ahead = COPIED_AHEAD if on_cuda else 0
        # Files from `create` are durable after `close`.
        super().__init__(location, sync_files=False, per_thread_copy_ahead=ahead)
        self.fs: Any = files
        self.path: Any = location

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return self.fs.files.retried(lambda: self._write_once(plan, planner))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        with self.fs.create_stream(join(self.path, PLAN_FILE), "wb") as file:
            file.write(from_metadata(metadata))

    def _write_once(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            cause = next((each for each in causes(error) if isinstance(each, OSError)), None)
            if cause is None:
                raise
            file = f"{self.path}/{plan.storage_data.prefix}*"
            if cause.errno is None:  # of an object store's driver
                raise OSError(f"{file}: {cause}") from error
            raise OSError(cause.errno, cause.strerror, file) from error


def _refuse_other_tensors(
    location: str,
    tensors: Tensors,
    there: Mapping[str, PlannedTensor],
    group: dist.ProcessGroup | None,
    may_hold_more: bool,
) -> None:
    parts = {name.split(".", 1)[0] for name in tensors}
    # With `may_hold_more` the names have no common first word, so pipeline stages would have different lists.
    known = [] if may_hold_more else sorted(name for name in there if name.split(".", 1)[0] in parts)
    missing = [name for name in tensors if name not in there]
    reshaped = [
        f"{name}: {list(there[name].shape)} in the checkpoint, {list(tensors[name].shape)} in the run"
        for name in tensors.keys() & there.keys()
        if there[name].shape != tuple(tensors[name].shape)
    ]
    wanted = torch.tensor([name in tensors for name in known], dtype=torch.uint8)
    gathered: list[Any] = [[missing, reshaped]]
    if group is not None:  # with pipeline stages, each rank has some of the names
        if not may_hold_more:
            dist.all_reduce(wanted, dist.ReduceOp.MAX, group=group)
        gathered = all_gather_json([missing, reshaped], group)
    missing = sorted({name for one, _ in gathered for name in one})
    reshaped = sorted({name for _, one in gathered for name in one})
    surplus = (
        [] if may_hold_more else [name for name, is_wanted in zip(known, wanted.tolist(), strict=True) if not is_wanted]
    )
    kinds = (
        ("the checkpoint lacks", missing),
        ("only the checkpoint has", surplus),
        ("shapes differ:", reshaped),
    )
    problems = mismatches(
        location, kinds, "start with the configuration that saved it, or with another job.dump_folder"
    )
    if problems:
        raise UserError(*problems)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Omits torch's CRC-32 of each tensor, which readers do not need: the SHA-256 covers the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def convert_dcp_errors(what: str) -> Iterator[None]:
    """Converts errors of DCP to one CheckpointError with the message of each failed rank. Suppresses DCP's warning
    about a single process, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            lines = [f"rank {rank}: {_format_error(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
            raise CheckpointError("\n".join([what, *lines])) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{what}\n{_format_error(error)}") from error


def _format_error(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"
