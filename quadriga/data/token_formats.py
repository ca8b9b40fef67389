"""The formats of files of token ids. Each has a class, which reads one file: its ids, and its documents if it has an
index of them.

To add a format, write a subclass of `TokenFile`, and add it to `token_files.FORMATS` and to `recognized_format`.
"""

from __future__ import annotations

import io
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.recognize import (
    LLMC_HEADERS,
    OLD_MEGATRON_MAGIC,
    WIDE_IDS,
    foreign_to_ids,
)
from quadriga.data.stored_arrays import LoadedArray, OpenFiles, StoredArray, path_of
from quadriga.errors import Problem, UserError, shortened

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64", "uint8", "int8", "int16", "uint64")
LLMC_BYTES = 1024  # 256 int32: magic, version, number of ids, zeros
HEAD_BYTES = 1024  # that decide which format a file has
MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MEGATRON_FLOATS = {6: "float64", 7: "float32"}
MEGATRON_HEADER = struct.Struct("<9sQBqq")  # magic, version, code of the dtype, sequences, document indices
INT32, INT64 = np.dtype("<i4"), np.dtype("<i8")
BLOCK = 1 << 16  # entries of an index that are read at once
Ends = Callable[[int, int], npt.NDArray[np.int64]]  # of a range of documents, the position after each
FORMAT_NAMES = {
    "quadriga": "a shard of `quadriga tokenize`",
    "megatron": "a file of Megatron with an index",
    "llmc": "a file with the header of llm.c",
    "npy": "a NumPy file with its header",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "raw": "a file without a header",
}


@dataclass(frozen=True)
class TokenOptions:
    """How the user wants files to be read. `key`: the section that the keys in messages are of."""

    token_format: str
    token_dtype: str | None
    field: str | None
    key: str


class Documents(NamedTuple):
    """Documents that a range of ids is from, in order: their numbers in the file, and where each ends in the file. The
    end of the last one can be any position after the range."""

    numbers: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class TokenFile(ABC):
    """One file of ids. Positions count the ids of the file from 0.

    length: the number of ids. dtype: that of `read`. indexed: an index separates documents. index: the file of it, if
    that is another one. digest: hashes of the content, if they are known without reading it.
    """

    indexed = False
    index: File | None = None
    digest = ""

    def __init__(self, file: File, length: int, dtype: np.dtype[Any]) -> None:
        self.file, self.length, self.dtype = file, length, dtype

    @abstractmethod
    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Ids [start, stop), in the dtype of the file. Raises UserError."""

    @abstractmethod
    def documents(self, start: int, stop: int) -> Documents:
        """The documents that ids [start, stop) are from. Only if `indexed`, for start < stop. Raises UserError."""

    def index_problems(self) -> Iterator[Problem]:
        """Reads the whole index, and yields what is wrong in it."""
        yield from ()


class PlainFile(TokenFile):
    """Ids in one array, after a header or none."""

    def __init__(self, ids: StoredArray) -> None:
        super().__init__(ids.file, ids.count, ids.dtype)
        self._ids = ids

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._ids.read(start, stop)

    def documents(self, start: int, stop: int) -> Documents:
        raise LookupError("the file has no index of documents")


def open_raw(files: OpenFiles, file: File, options: TokenOptions) -> TokenFile:
    """A headerless file, as nanoGPT (`.bin`) and OLMo-core (`.npy`) write it."""
    head = files.read(file, 0, min(HEAD_BYTES, file.size))
    bytes_are_ids = options.token_dtype in ("uint8", "int8")  # ids of one byte can look like text
    if (foreign := foreign_to_ids(head, or_text=not bytes_are_ids)) is not None:
        what, fix = foreign
        raise UserError(Problem(path_of(file), what, fix=fix))
    if options.token_dtype is None:
        what = "the file has no header, so the type of its ids is not known"
        fix = f"set {options.key}.token_dtype to the type that it was written with (nanoGPT and most others: uint16)"
        raise UserError(Problem(path_of(file), what, allowed=", ".join(TOKEN_DTYPES), fix=fix))
    dtype = _little_endian(options.token_dtype)
    if file.size % dtype.itemsize:
        what = f"its {file.size:,} bytes are no whole number of {options.token_dtype} ids of {dtype.itemsize} bytes"
        fix = f"set {options.key}.token_dtype to the type that it was written with, or copy the file again"
        raise UserError(Problem(path_of(file), what, fix=fix))
    ids = np.frombuffer(head[: len(head) // (2 * dtype.itemsize) * 2 * dtype.itemsize], dtype)
    wider = [name for name in TOKEN_DTYPES if np.dtype(name).itemsize > dtype.itemsize]
    every_second_is_0 = len(ids) >= WIDE_IDS and not ids[1::2].any() and np.count_nonzero(ids[::2]) >= WIDE_IDS // 4
    if wider and every_second_is_0:
        what = f"read as {options.token_dtype}, every second id is 0: its ids are wider"
        raise UserError(Problem(path_of(file), what, fix=f"set {options.key}.token_dtype to one of {', '.join(wider)}"))
    return PlainFile(StoredArray(files, file, dtype, 0, file.size // dtype.itemsize))


def open_llmc(files: OpenFiles, file: File, options: TokenOptions) -> TokenFile:
    """A file of llm.c: a header of 256 int32, then the ids."""
    head = files.read(file, 0, min(LLMC_BYTES, file.size))
    dtype = _little_endian(LLMC_HEADERS[head[:8]])
    count = int.from_bytes(head[8:12], "little", signed=True)
    size = LLMC_BYTES + count * dtype.itemsize
    if count < 0 or size != file.size:
        what = f"its header counts {count:,} ids, which makes {max(size, 0):,} bytes; it has {file.size:,} bytes"
        raise UserError(Problem(path_of(file), what, fix="copy or write the file again"))
    return PlainFile(StoredArray(files, file, require_dtype(file, dtype, options), LLMC_BYTES, count))


def open_npy(files: OpenFiles, file: File, options: TokenOptions) -> TokenFile:
    """A file of `numpy.save`: one dimension of integers, of either byte order. Nothing is unpickled."""
    stream = io.BytesIO(files.read(file, 0, min(limits.NPY_HEADER_BYTES + 12, file.size)))
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with warnings.catch_warnings(action="ignore"):
            version = np.lib.format.read_magic(stream)
            shape, _, dtype = headers[version](stream, max_header_size=limits.NPY_HEADER_BYTES)
    except Exception as error:  # the parser raises many kinds of errors for damaged headers
        what = "the file begins as a NumPy file, and its header cannot be read"
        raise UserError(Problem(path_of(file), what, fix="write the file again (numpy.save)")) from error
    fix = "save it as one row of integers: numpy.save(FILE, array.reshape(-1).astype(numpy.uint32))"
    if dtype.kind not in "iu":
        raise UserError(Problem(path_of(file), f"its values are of type {dtype}", allowed="integers", fix=fix))
    if len(shape) != 1:
        raise UserError(Problem(path_of(file), f"the array has {len(shape)} dimensions", allowed="one", fix=fix))
    if shape[0] < 0 or stream.tell() + shape[0] * dtype.itemsize != file.size:
        count = shortened(f"{shape[0]:,}")  # which can have thousands of digits
        what = f"its header counts {count} ids of {dtype.itemsize} bytes; the file has {file.size:,} bytes"
        raise UserError(Problem(path_of(file), what, fix="copy or write the file again"))
    return PlainFile(StoredArray(files, file, require_dtype(file, dtype, options), stream.tell(), shape[0]))


class MegatronFile(PlainFile):
    """The `.bin` of a pair of Megatron: sequences of ids, one after the other. The `.idx` has the length and the first
    byte of each sequence, and by document its first sequence, followed by the number of sequences."""

    indexed = True
    index: File

    def __init__(self, ids: StoredArray, index: File, lengths: StoredArray, pointers: StoredArray, of: StoredArray):
        super().__init__(ids)
        self.index, self._lengths, self._pointers, self._documents = index, lengths, pointers, of

    def documents(self, start: int, stop: int) -> Documents:
        size = self.dtype.itemsize
        first = self._pointers.search(start * size) - 1  # sequences
        last = self._pointers.search((stop - 1) * size, near=max(first, 0)) - 1
        begin = self._documents.search(first) - 1  # documents
        end = self._documents.search(last, near=max(begin, 0))
        within = 0 <= first <= last and 0 <= begin < end < self._documents.count
        if not within or not 0 <= self._documents.at(begin) <= first:
            raise UserError(self._damaged(f"it has no document for id {start:,}"))
        try:
            return join_documents(begin, end, start, stop, self._ends)
        except ValueError as error:
            raise UserError(self._damaged(str(error))) from error

    def _ends(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The position after the last id of documents [begin, end)."""
        return self._first_ids(self._documents.read(begin + 1, end + 1))

    def _first_ids(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The position of the first id of each sequence; of the sequence after the last one, the number of ids."""
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or high > self._pointers.count:
            raise UserError(self._damaged(f"it names sequence {low if low < 0 else high:,}, which it does not have"))
        last = self._pointers.count
        inner = sequences[sequences < last]
        if len(inner) and inner.max() - inner.min() < 4 * len(inner) + 1024:
            pointers = self._pointers.read(int(inner.min()), int(inner.max()) + 1)[inner - inner.min()]
        else:
            pointers = np.array([self._pointers.at(int(sequence)) for sequence in inner], np.int64)
        found = np.full(len(sequences), self.length, np.int64)
        found[sequences < last] = pointers // self.dtype.itemsize
        return found

    def index_problems(self) -> Iterator[Problem]:
        position = 0
        for start in range(0, self._pointers.count, BLOCK):
            stop = min(start + BLOCK, self._pointers.count)
            lengths, pointers = self._lengths.read(start, stop), self._pointers.read(start, stop)
            sizes = lengths.astype(np.int64) * self.dtype.itemsize
            expected = position + np.concatenate([[0], np.cumsum(sizes)[:-1]])
            wrong = np.flatnonzero((pointers != expected) | (lengths < 0))
            if len(wrong):
                at = int(wrong[0])
                what = f"sequence {start + at:,} of {int(lengths[at]):,} ids begins at byte {int(pointers[at]):,}"
                yield self._damaged(f"{what}; the one before it ends at byte {int(expected[at]):,}")
                return
            position = int(expected[-1] + sizes[-1])
        before = 0
        for start in range(0, self._documents.count, BLOCK):
            entries = self._documents.read(start, min(start + BLOCK, self._documents.count))
            wrong = np.flatnonzero(np.diff(entries, prepend=before) < 0)
            if len(wrong):
                yield self._damaged(f"document {start + int(wrong[0]):,} begins before the one before it")
                return
            before = int(entries[-1])

    def _damaged(self, what: str) -> Problem:
        return Problem(path_of(self.index), f"the index is damaged: {what}", fix="copy or write both files again")


def open_megatron(files: OpenFiles, file: File, index: File, options: TokenOptions) -> TokenFile:
    """A pair of Megatron, by `.bin` and `.idx`. The header, the sizes and the last entries are checked, in O(1)."""

    def refuse(what: str, fix: str = "copy or write both files again") -> UserError:
        return UserError(Problem(path_of(index), what, fix=fix))

    if index.size < MEGATRON_HEADER.size:
        raise refuse(f"the index has {index.size} bytes, fewer than its header")
    magic, version, code, sequences, documents = MEGATRON_HEADER.unpack(files.read(index, 0, MEGATRON_HEADER.size))
    if magic.startswith(OLD_MEGATRON_MAGIC):
        fix = "write the pair again in the format MMIDIDX (preprocess_data.py --dataset-impl mmap)"
        raise refuse("the index has the older format TNTIDX of Megatron, which cannot be read", fix)
    if version != 1:
        raise refuse(f"the index is of version {version}; only version 1 of Megatron's format can be read")
    if code not in MEGATRON_DTYPES:
        kind = f"{MEGATRON_FLOATS[code]} values, not token ids" if code in MEGATRON_FLOATS else "values of unknown type"
        raise refuse(f"the pair has {kind} (type code {code})", "name a pair of token ids")
    dtype = np.dtype(MEGATRON_DTYPES[code])
    sizes = (MEGATRON_HEADER.size, 4 * sequences, 8 * sequences, 8 * documents)
    lengths_at, pointers_at, documents_at, size = accumulate(sizes)
    if min(sequences, documents) < 0 or index.size not in (size, size + sequences):  # without or with modes
        what = f"it counts {sequences:,} sequences and {documents:,} document indices, which makes"
        raise refuse(f"{what} {max(size, 0):,} bytes; it has {index.size:,} bytes")
    lengths = StoredArray(files, index, INT32, lengths_at, sequences)
    pointers = StoredArray(files, index, INT64, pointers_at, sequences)
    of_documents = StoredArray(files, index, INT64, documents_at, documents)
    end = pointers.at(sequences - 1) + lengths.at(sequences - 1) * dtype.itemsize if sequences else 0
    if end != file.size or file.size % dtype.itemsize:
        raise refuse(f"its last sequence ends at byte {end:,} of {file.name}, which has {file.size:,} bytes")
    most = file.size // dtype.itemsize + limits.TOKEN_EMPTY_DOCUMENTS
    if sequences > most or documents - 1 > most:
        raise refuse(f"it counts {max(sequences, documents - 1):,} sequences or documents, of which most have no ids")
    if documents < 1 or of_documents.at(0) != 0 or of_documents.at(documents - 1) != sequences:
        raise refuse("its document indices do not begin with 0 and end with the number of sequences")
    ids = StoredArray(files, file, require_dtype(file, dtype, options), 0, file.size // dtype.itemsize)
    return MegatronFile(ids, index, lengths, pointers, of_documents)


def recognized_format(head: bytes) -> str:
    """The name of a file's format, one of `FORMAT_NAMES`, by its first bytes. A pair of Megatron is known by its index
    instead."""
    if head[:8] in LLMC_HEADERS:
        return "llmc"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith((b"PAR1", b"PARE")):
        return "parquet"
    if head.startswith(b"ARROW1") or _begins_as_arrow_stream(head):
        return "arrow"
    return "raw"


def _begins_as_arrow_stream(head: bytes) -> bool:
    length = int.from_bytes(head[4:8], "little", signed=True)
    return head.startswith(b"\xff\xff\xff\xff") and 0 <= length <= limits.ARROW_METADATA_BYTES and length % 8 == 0


def documents_between(bounds: StoredArray | LoadedArray, start: int, stop: int) -> Documents:
    """The documents that values [start, stop) are from. `bounds`: by document its first value, followed by the number
    of values. Numbers and ends are those of `bounds`. Raises ValueError if the bounds are not in order."""
    begin = bounds.search(start) - 1
    end = bounds.search(stop - 1, near=max(begin, 0))
    if not 0 <= begin < end < bounds.count:
        raise ValueError(f"no document has id {start:,}")
    return join_documents(
        begin, end, start, stop, lambda first, after: bounds.read(first + 1, after + 1).astype(np.int64)
    )


def join_documents(begin: int, end: int, start: int, stop: int, ends_of: Ends) -> Documents:
    """Of documents [begin, end), those that have ids of [start, stop). Raises ValueError if they are not in order."""
    numbers, ends, before = [], [], start
    if end - begin > stop - start + limits.TOKEN_EMPTY_DOCUMENTS:
        raise ValueError(f"more than {limits.TOKEN_EMPTY_DOCUMENTS:,} documents from number {begin:,} on have no ids")
    for block in range(begin, end, BLOCK):
        found = ends_of(block, min(block + BLOCK, end))
        begins = np.concatenate([[before], found[:-1]])
        if (found < begins).any():
            raise ValueError(f"the documents from number {block:,} on are not in order")
        full = found > begins  # documents without ids are skipped
        numbers.append(block + np.flatnonzero(full))
        ends.append(found[full])
        before = int(found[-1])
    if before < stop:
        raise ValueError(f"no document has id {before:,}")
    return Documents(np.concatenate(numbers), np.concatenate(ends))


def _little_endian(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def require_dtype(file: File, dtype: np.dtype[Any], options: TokenOptions) -> np.dtype[Any]:
    """`dtype`. Raises UserError if the user names another one."""
    if options.token_dtype not in (None, dtype.name):
        what = f"the file says that its ids are {dtype.name}"
        where = f"{options.key}.token_dtype, {path_of(file)}"
        fix = f"set {options.key}.token_dtype to {dtype.name}"  # the key can be inherited, so it cannot be removed
        raise UserError(Problem(where, what, options.token_dtype, fix=fix))
    return dtype
