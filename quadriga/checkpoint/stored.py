"""Reads the tensors of a checkpoint: its plan, which is read and checked once, and a reader of its tensors for DCP.

    stored = open_stored(place, group, found.files)       # all ranks together
    stored.plan.tensors                                   # names, dtypes, shapes
    load(tensors, storage_reader=stored.reader(tensors), planner=TensorPlanner(), ...)

The first rank reads the plan and sends it to the others as JSON. DCP gets objects that are built from the checked plan,
never the file. Nothing is unpickled: see SECURITY.md.

A chunk is in the format of `torch.save`: a zip archive with a small pickle and the elements. It is not read with
`torch.load`, not even with `weights_only=True`, which calls every class on PyTorch's allowlist (for example a
`DeviceMesh`, which waits for other ranks), inflates archives, allocates storages of any size, and compares the names of
records without regard to case, so it could read another record than the checked one. Here the pickle must describe one
plain tensor and nothing else, the record of its elements must have exactly their bytes, and the tensor is made of these
bytes.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from quadriga import limits
from quadriga.checkpoint import plan as plans
from quadriga.checkpoint.files import Files, Location, files_at, join
from quadriga.checkpoint.folder import FileFacts
from quadriga.checkpoint.manifest import METADATA
from quadriga.checkpoint.messages import refusal_error
from quadriga.checkpoint.plan import DTYPES, Plan, PlanError
from quadriga.checkpoint.plan_format import LINK
from quadriga.checkpoint.ranks import on_first_rank
from quadriga.checkpoint.tensors import convert_dcp_errors
from quadriga.json_collectives import broadcast_bytes

IN_MEMORY = 1 << 24  # bytes of a chunk that is read at once, because each seek in an object store is a request
LOCAL_HEADER = 30  # bytes before a record's name in a zip archive
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# The opcodes of a pickled tensor, without those of the memo: rebuild(storage(...), offset, size, stride,
# requires_grad, hooks [, dtype]). `i` is any integer, `b` a boolean, `o` the empty tuple.
_INTEGERS = r"(?:o|i1|ii2|iii3|mi{4,}t)"
TENSOR = re.compile(rf"pgmmsgssitQi{_INTEGERS}{_INTEGERS}bgoRg?tR\.")
LETTERS = {
    "PROTO": "p",
    "GLOBAL": "g",
    "MARK": "m",
    "BINUNICODE": "s",
    "BINPERSID": "Q",
    "REDUCE": "R",
    "STOP": ".",
    "BININT": "i",
    "BININT1": "i",
    "BININT2": "i",
    "LONG1": "i",
    "NEWTRUE": "b",
    "NEWFALSE": "b",
    "EMPTY_TUPLE": "o",
    "TUPLE1": "1",
    "TUPLE2": "2",
    "TUPLE3": "3",
    "TUPLE": "t",
    "BINPUT": "",
    "LONG_BINPUT": "",
}


class StoredTensors:
    """The tensors in a folder or object store. Its methods can be called on a single rank."""

    def __init__(self, location: Location, plan: Plan, retries: int = 5) -> None:
        self.location, self.plan = str(location), plan
        self._files = files_at(location, retries)

    def reader(self, names: Iterable[str]) -> TensorReader:
        """A DCP reader of these tensors. Raises KeyError for a name that is not in the plan."""
        return TensorReader(self.location, self._files, dcp_metadata(self.plan, names))


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


def dcp_metadata(plan: Plan, names: Iterable[str]) -> Metadata:
    """DCP's metadata of these tensors. Raises KeyError for a name that is not in the plan."""
    tensors, storage = {}, {}
    for name in names:
        planned = plan.tensors[name]
        chunks = []
        for number, (offsets, sizes, file, start, length, *transforms) in enumerate(planned.chunks):
            position = torch.Size(offsets)
            chunks.append(ChunkStorageMetadata(position, torch.Size(sizes)))
            info = _StorageInfo(plan.files[file], start, length, *transforms)
            storage[MetadataIndex(name, position, number)] = info
        properties = TensorProperties(dtype=planned.dtype)
        tensors[name] = TensorStorageMetadata(properties, torch.Size(planned.shape), chunks)
    return Metadata(cast(dict[str, Any], tensors), storage_data=storage, storage_meta=StorageMeta())


def open_stored(
    location: Location, group: dist.ProcessGroup | None, facts: Mapping[str, FileFacts] | None = None, retries: int = 5
) -> StoredTensors:
    """The tensors in a folder or object store. `facts`: the files in the manifest; empty or None: no manifest.

    Call on all ranks of the group. Raises CheckpointError on every rank if the plan is missing or damaged, or refers to
    anything except tensors in the files of this folder."""
    found: list[tuple[Plan, bytes]] = []

    def read() -> None:
        plan, text = plans.read_plan(location, facts or {}, retries)
        if group is not None and not text:
            text = plan.as_json()
            try:
                plans.check_text(text)  # as the other ranks do
            except PlanError as error:
                raise refusal_error(join(location, METADATA), error) from error
        found.append((plan, text))

    on_first_rank(group, read)
    if group is None:
        return StoredTensors(location, found[0][0], retries)
    text = broadcast_bytes(found[0][1] if found else None, group)
    return StoredTensors(location, found[0][0] if found else plans.parse_plan(text), retries)


def open_file(files: Files, location: str, name: str) -> IO[bytes]:
    """Opens a file of tensors. Raises PlanError for a link."""
    path = join(location, name)
    if files.is_link(path):
        raise PlanError(f"{plans.format_raw(name)} {LINK}")
    return files.open(path, "rb")


class TensorPlanner(DefaultLoadPlanner):
    """Plans the load of tensors with flat names, and refuses all other objects."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Raises PlanError. DCP's own method would unpickle the object."""
        raise PlanError(f"{plans.format_raw(read_item.dest_index.fqn)} is a pickled object, which is not read")


class TensorReader(StorageReader):
    """Reads the tensors of a checked plan, as a storage reader of DCP."""

    def __init__(self, location: str, files: Files, metadata: Metadata) -> None:
        self._location, self._files, self._metadata = location, files, metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        return None

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # made by `StoredTensors.reader`, not found by DCP

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._files.retried(lambda: self._read(plan, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_file: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
        for item in plan.items:
            info = self._metadata.storage_data[item.storage_index]
            by_file.setdefault(info.relative_path, []).append((info, item))
        for name, items in by_file.items():
            path = join(self._location, name)
            reading: tuple[_StorageInfo, ReadItem] | None = None
            try:
                with open_file(self._files, self._location, name) as file:
                    for reading in sorted(items, key=lambda one: one[0].offset):
                        self._fill(file, *reading, planner)
            except PlanError as error:
                if reading is not None:
                    path += f" ({plans.format_raw(reading[1].storage_index.fqn)} at byte {reading[0].offset})"
                raise refusal_error(path, error) from error

    def _fill(self, file: IO[bytes], info: _StorageInfo, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type is not LoadItemType.TENSOR:
            raise PlanError("is not a tensor")
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)  # a plan has no others
        assert item.storage_index.index is not None
        chunk, dtype = entry.chunks[item.storage_index.index], entry.properties.dtype
        if info.transform_descriptors:
            kinds = plans.format_raw(", ".join(info.transform_descriptors))
            raise PlanError(f"was saved with a transform ({kinds}), which is not supported: save it again without it")
        copy_part(read_chunk(Slice(file, info.offset, info.length), info.length, dtype, chunk.sizes), item, planner)


def copy_part(saved: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copies the part of a chunk that an item requests to its target. Raises PlanError if the shapes differ."""
    for dimension, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        saved = saved.narrow(dimension, start, size)
    target = planner.resolve_tensor(item).detach()
    if target.shape != saved.shape:
        raise PlanError(f"a part of shape {list(saved.shape)} for one of shape {list(target.shape)}")
    target.copy_(saved)
    planner.commit_tensor(item, target)


class Slice(io.RawIOBase):
    """A byte range of an open file, as a file object."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), max(0, self._length - self._at))
            self._file.seek(self._start + self._at)
            read = cast(Any, self._file).readinto(view[:count])
        self._at += read
        return int(read)


def read_chunk(stream: Any, length: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor in a chunk of `length` bytes, in host memory. `stream`: a seekable binary file.

    Raises:
        PlanError: it is not exactly one plain tensor of this dtype and shape.
    """
    if length <= IN_MEMORY:
        stream = io.BytesIO(stream.read(length))
    try:
        tensor = _tensor(stream, length, dtype)
    except (OSError, PlanError):
        raise
    except Exception as error:
        first = str(error).partition("\n")[0][:300]
        raise PlanError(f"no tensor can be read from it ({type(error).__name__}: {first!r})") from error
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise PlanError("it is not a plain tensor")
    if tensor.dtype != dtype or list(tensor.shape) != list(shape):
        there, planned = (
            f"{kind} of shape {list(size)}" for kind, size in ((tensor.dtype, tensor.shape), (dtype, shape))
        )
        raise PlanError(f"it is a tensor of {there}, but the plan has {planned}")
    return tensor


def _tensor(stream: Any, length: int, dtype: torch.dtype) -> torch.Tensor:
    record, needed, (offset, *layout) = _check_archive(stream, length, dtype)
    sizes, strides = layout[: len(layout) // 2], layout[len(layout) // 2 :]
    if len(sizes) != len(strides):
        _refuse("sizes and strides of different lengths")
    content = _content(stream, record)
    if len(content) != needed:
        _refuse("its elements end too early")
    numbers = torch.frombuffer(content, dtype=torch.uint8).view(dtype) if needed else torch.empty(0, dtype=dtype)
    return numbers.as_strided(sizes, strides, offset)  # raises if the tensor exceeds its storage


def _check_archive(stream: IO[bytes], length: int, dtype: torch.dtype) -> tuple[zipfile.ZipInfo, int, list[int]]:
    with zipfile.ZipFile(stream) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if not 0 < len(records) == len(archive.infolist()) <= limits.SHARD_RECORDS:
            _refuse("too many records, or two with the same name")
    for name, record in records.items():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            _refuse(f"{name!r} is compressed")
        if record.file_size > length:
            _refuse(f"{name!r} is longer than the chunk")
    pickles = [record for name, record in records.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > limits.SHARD_PICKLE_BYTES:
        _refuse("it has no pickle of one tensor")
    key, needed, layout = _described(bytes(_content(stream, pickles[0])), dtype)
    numbers = records.get(pickles[0].filename.replace("data.pkl", f"data/{key}"))
    if numbers is None or numbers.file_size != needed:
        _refuse(f"{needed} bytes of elements are described, but missing")
    return numbers, needed, layout


def _content(stream: IO[bytes], record: zipfile.ZipInfo) -> bytearray:
    """The content of a stored record. `ZipFile.read` cannot be used, because saves omit the CRC-32 (see `tensors`)."""
    stream.seek(record.header_offset)
    header = stream.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\3\4":
        _refuse("its records are not at the positions in its directory")
    stream.seek(record.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30])))
    content, there = bytearray(record.file_size), 0
    with memoryview(content) as view:
        while count := cast(Any, stream).readinto(view[there:]):
            there += count
    return content[:there] if there < len(content) else content


def _described(pickle: bytes, dtype: torch.dtype) -> tuple[str, int, list[int]]:
    """The storage of a pickled tensor of this dtype: its key, its bytes, and [offset, *sizes, *strides] of the tensor
    in it, in elements. Nothing of the pickle is executed."""
    letters = ""
    names: list[str] = []
    texts: list[str] = []
    numbers: list[int] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        letter = LETTERS.get(opcode.name)
        if letter is None:
            _refuse(f"its pickle has the opcode {opcode.name}, which tensors do not use")
        letters += letter
        if letter == "g":
            names.append(cast(Any, argument))
        elif letter == "s":
            texts.append(cast(Any, argument))
        elif letter == "i":
            numbers.append(cast(Any, argument))
    if not TENSOR.fullmatch(letters) or texts[0] != "storage":
        _refuse("its pickle does not describe one tensor")
    rebuild, storage, hooks, *kinds = names
    if rebuild == "torch._utils _rebuild_tensor_v2" and not kinds:
        known = DTYPES.get(STORAGES.get(storage.removeprefix("torch "), ""))
        size = dtype.itemsize if known == dtype else 0
    else:
        known = DTYPES.get(kinds[0].removeprefix("torch ")) if kinds else None
        size = 1 if (rebuild, storage) == ("torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage") else 0
    if hooks != "collections OrderedDict" or known != dtype or not size:
        _refuse(f"its pickle does not describe a tensor of {dtype}: {' '.join(names)[:200]!r}")
    return texts[1], numbers[0] * size, numbers[1:]


def _refuse(what: str) -> NoReturn:
    raise PlanError(f"it is not an archive of a tensor: {what}")
