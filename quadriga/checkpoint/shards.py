"""Reads one chunk of a tensor from a file of a checkpoint, also from an untrusted source.

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
from collections.abc import Sequence
from typing import IO, Any, NoReturn, cast

import torch

from quadriga import limits
from quadriga.checkpoint.plan import DTYPES, PlanError

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
    "TUPLE": "t",
    "BINPERSID": "Q",
    "REDUCE": "R",
    "BININT": "i",
    "BININT1": "i",
    "BININT2": "i",
    "LONG1": "i",
    "NEWTRUE": "b",
    "NEWFALSE": "b",
    "STOP": ".",
    "EMPTY_TUPLE": "o",
    "TUPLE1": "1",
    "TUPLE2": "2",
    "TUPLE3": "3",
    "BINPUT": "",
    "LONG_BINPUT": "",
}


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
