"""Saves tensors of a run: their names and values, and the files that `torch.distributed.checkpoint` (DCP) writes.

`ModelState`, `OptimizerState` and `RandomState` give tensors with the same names on every layout. Hyperparameters of
the optimizer are not saved. They come from the configuration and the schedule, so that a resume never silently undoes a
changed learning rate.

Each rank writes its shards. Mappings are flat, from name to tensor; sharded tensors are DTensors. `group` None is a
single process. The group should be a gloo group without other use, because planning sends small objects between ranks
while training can use the other groups.

DCP writes its plan as a pickle, `.metadata`, for its own loads. A save also writes it as JSON (`plan.json`,
see `plan`), which loads read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from quadriga.checkpoint.files import Files, Location, files_at, join
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.plan_format import FORMAT, PLAN_FILE
from quadriga.errors import Problem, UserError, causes, shortened
from quadriga.units import strip_wrappers

Tensors = Mapping[str, torch.Tensor]
COPIED_AHEAD = 10_000_000  # bytes that DCP copies ahead from the device
CPU = torch.device("cpu")
WORDS = 624  # in the state of a Mersenne Twister


class ModelState:
    """Parameters and persistent buffers of all model parts of this rank, by their full names."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._parts = tuple(parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies; sharded tensors as DTensors."""
        return {
            strip_wrappers(name): value.detach() for part in self._parts for name, value in part.state_dict().items()
        }

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        _copy(self.state_dict(), loaded)


class OptimizerState:
    """Moments and step counts, named `NAME.KEY` (`layers.0.attention.wq.weight.exp_avg`)."""

    def __init__(self, parts: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        named = (pair for part in parts for pair in part.named_parameters())
        self._names: dict[torch.Tensor, str] = {parameter: strip_wrappers(name) for name, parameter in named}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies. Before the first step, they are created as zeros."""
        for optimizer in self._optimizers:
            if not optimizer.state:
                _make_state(optimizer)
        return {
            f"{self._names[parameter]}.{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        _copy(self.state_dict(), loaded)


class RandomState:
    """The random generators of this rank, named `RANK.GENERATOR`: of torch, its device, Python and NumPy. A run on CPU
    does not save or load that of CUDA, even on a machine with a GPU, because this would initialize CUDA.

    Training itself draws no random numbers. Code that is added and does so continues with the same generators.
    """

    def __init__(self, rank: int, device: torch.device = CPU) -> None:
        self._rank, self._device = rank, device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the states: uint8 or int64, one dimension."""
        version, words, _ = random.getstate()
        numpy: Any = np.random.get_state(legacy=True)
        states = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor([version, *words], dtype=torch.int64),
            "numpy": torch.tensor([int(numpy[2]), *map(int, numpy[1])], dtype=torch.int64),
        }
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return {f"{self._rank}.{name}": state for name, state in states.items()}

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Sets the generators in `loaded`; others are unchanged. Raises UserError if a state is not valid for its
        generator."""
        for name, state in loaded.items():
            generator = name.partition(".")[2]
            try:
                self._restore(generator, state)
            except (ValueError, OverflowError, RuntimeError) as error:
                what = f"the value in the checkpoint is not a state of a random generator: {shortened(error, 200)}"
                fix = (
                    "exclude the generators (--checkpoint.exclude_from_loading '[\"random\"]'), "
                    "which then start anew; or start from another checkpoint (--checkpoint.load_step)"
                )
                raise UserError(Problem(f"random.{name}", what, fix=fix)) from error

    def _restore(self, generator: str, state: torch.Tensor) -> None:
        if generator == "torch":
            _check_torch(state)
            torch.set_rng_state(state)
        elif generator == "python":
            version, *words = state.tolist()
            random.setstate((version, tuple(words), None))
        elif generator == "numpy":
            position, *keys = state.tolist()
            if not 0 <= position <= WORDS:  # NumPy does not check it, and would read out of bounds
                raise ValueError(f"position {position} of {WORDS}")
            np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
        elif generator == "cuda" and self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)


def _check_torch(state: torch.Tensor) -> None:
    """Checks the state of torch's CPU generator: seed (8 bytes), number of words left (4), flag (4), next word (8), all
    words, and more. torch does not check that so many words are left, and would read out of bounds."""
    left, following = struct.unpack_from("<i4xQ", state.numpy().tobytes(), 8)
    if left + following > WORDS + 1:
        raise ValueError(f"{left} words left from word {following} on, of {WORDS}")


def _make_state(optimizer: Optimizer) -> None:
    """Creates the state of an optimizer, which is created in its first step: takes a step with learning rate 0, then
    sets the state to zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [p.grad for p in parameters]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


@torch.no_grad()
def _copy(own: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> None:
    if own.keys() != loaded.keys():
        raise KeyError(f"names differ: {sorted(own.keys() ^ loaded.keys())[:5]}")
    for name, value in own.items():
        value.copy_(loaded[name])


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


class StreamingPlanner(DefaultSavePlanner):
    """Makes each tensor when it is written, if `make` returns one for its name. `options`: of `DefaultSavePlanner`."""

    refused: UserError | None = None  # the UserError that ended the save, because DCP would wrap it

    def __init__(self, make: Callable[[str], torch.Tensor | None], **options: Any) -> None:
        super().__init__(**options)
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Any:
        try:
            made = self._make(index.fqn)
        except UserError as error:
            self.refused = error
            raise
        return super().lookup_object(index) if made is None else made


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
        # torch 2.11 fills a copy of `metadata`, and leaves this one without its storage data.
        metadata.storage_data = {one.index: one.storage_data for part in results for one in part}
        with self.fs.create_stream(join(self.path, PLAN_FILE), "wb") as file:
            file.write(plan_text(metadata))

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


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Omits torch's CRC-32 of each tensor, which readers do not need: the SHA-256 covers the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def plan_text(metadata: Metadata) -> bytes:
    """The text of `plan.json` for the metadata that DCP wrote. Entries that are not tensors are omitted."""
    files: dict[str, int] = {}
    lines = []  # one per tensor, for readability
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = []
            for chunk in entry.chunks:
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                file = files.setdefault(info.relative_path, len(files))
                transforms = [list(info.transform_descriptors)] if info.transform_descriptors else []
                chunks.append([[*chunk.offsets], [*chunk.sizes], file, info.offset, info.length, *transforms])
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            text = json.dumps({"dtype": dtype, "shape": [*entry.size], "chunks": chunks}, separators=(",", ":"))
            lines.append(f" {json.dumps(name)}: {text}")
    head = f'{{"format": {json.dumps(FORMAT)},\n "files": {json.dumps([*files])},\n "tensors": {{\n'
    return (head + ",\n".join(lines) + "\n}}\n").encode()


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
