"""Columns of token ids in Arrow files: IPC files, and IPC streams such as those of the library `datasets`.

Only the metadata of record batches are read here, which are flatbuffers. Ids and lists are then read in place. So a
file is neither mapped into memory, nor is a whole record batch read for a few ids of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.sources import require_library
from quadriga.data.stored_arrays import OpenFiles, StoredArray, path_of
from quadriga.data.token_columns import WITHOUT_NULLS, ColumnFile, IdColumn, find_id_column
from quadriga.data.token_formats import Documents, TokenFile, TokenOptions, documents_between
from quadriga.errors import Problem, UserError, shortened

MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
SCHEMA, RECORD_BATCH = 1, 3  # types of messages; 2 is a dictionary
FOOTER_BATCHES = 3  # fields of flatbuffers, by their numbers in Arrow's Message.fbs, Schema.fbs and File.fbs
MESSAGE_TYPE, MESSAGE_HEADER, MESSAGE_BODY = 1, 2, 3
BATCH_ROWS, BATCH_NODES, BATCH_BUFFERS, BATCH_COMPRESSION = 0, 1, 2, 3
SCHEMA_ENDIANNESS = 0
NODE, BUFFER, BLOCK = "<qq", "<qq", "<qi4xq"  # length, nulls; offset, length; offset, bytes of metadata and of body
BUFFERS = {"null": 0, "struct": 1, "fixed_size_list": 1, "list": 2, "large_list": 2, "map": 2, "dictionary": 2}
BUFFERS |= {"primitive": 2, "boolean": 2, "fixed_size_binary": 2, "decimal": 2}
BUFFERS |= {"string": 3, "binary": 3, "large_string": 3, "large_binary": 3}  # by type, without those of its children
UNCOMPRESSED = 'write it uncompressed: pyarrow.feather.write_feather(table, FILE, compression="uncompressed")'


class ArrowBatch(NamedTuple):
    """A record batch's column of ids. Offsets count the bytes of the file."""

    rows: int
    ids: int
    values_at: int  # offset of the first id
    bounds_at: int  # offset of the first bound of lists


class ArrowColumn(ColumnFile):
    """A part is a record batch, not compressed, so that its ids and lists can be read in place."""

    def __init__(
        self, files: OpenFiles, file: File, column: IdColumn, bounds: np.dtype[Any], batches: Sequence[ArrowBatch]
    ) -> None:
        super().__init__(file, column, [batch.ids for batch in batches], [batch.rows for batch in batches])
        self._files = files
        self._bounds = bounds
        self._places = np.array([batch[2:] for batch in batches], np.int64).reshape(-1, 2)

    def _values(self, part: int, start: int, stop: int) -> npt.NDArray[Any]:
        return StoredArray(self._files, self.file, self.dtype, int(self._places[part, 0]), stop).read(start, stop)

    def _lists(self, part: int, start: int, stop: int) -> Documents:
        if self.column.width:
            numbers = np.arange(start // self.column.width, (stop - 1) // self.column.width + 1)
            return Documents(numbers, (numbers + 1) * self.column.width)
        rows = int(self.parts.rows[part + 1] - self.parts.rows[part])
        bounds = StoredArray(self._files, self.file, self._bounds, int(self._places[part, 1]), rows + 1)
        base = bounds.at(0)
        try:
            found = documents_between(bounds, start + base, stop + base)
        except ValueError as error:
            raise UserError(_damaged(self.file, f"record batch {part}: {error}")) from error
        return Documents(found.numbers, found.ends - base)


def open_arrow(files: OpenFiles, file: File, options: TokenOptions) -> TokenFile:
    """Reads the metadata of all record batches, and two bounds of each."""
    require_library("pyarrow", path_of(file), "an Arrow file")
    import pyarrow

    try:
        in_stream = files.read(file, 0, min(8, file.size))[:6] != MAGIC
        first = _read_message(files, file, 0 if in_stream else 8)
        if first is None or first.table.number(MESSAGE_TYPE, "<B") != SCHEMA:
            raise ValueError("it does not begin with a schema")
        schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(first.content))
        column = find_id_column(file, schema, options)
        if first.header.number(SCHEMA_ENDIANNESS, "<h"):
            raise ValueError("its numbers are big-endian")
        layout = _Layout(schema, column)
        messages = _stream(files, file, first.end) if in_stream else _batches_of_footer(files, file)
        batches = [_batch(files, file, message, number, column, layout) for number, message in enumerate(messages)]
        if sum(batch.ids for batch in batches) * column.dtype.itemsize > file.size:
            raise ValueError("several of its record batches have the same ids")
    except UserError:
        raise
    except Exception as error:  # pyarrow and struct raise many kinds of errors for damaged files
        raise UserError(_damaged(file, " ".join(str(error).split()) or type(error).__name__)) from error
    return ArrowColumn(files, file, column, layout.bounds, batches)


class _Table:
    """A table of a flatbuffer. Positions outside of it raise struct.error or ValueError."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._unpack("<i", at)[0]

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        if at < 0:
            raise ValueError("its metadata are damaged")
        return struct.unpack_from(form, self._data, at)

    def _field(self, number: int) -> int | None:
        """The position of a field; None if it has its default value."""
        slot = 4 + 2 * number
        if slot + 2 > self._unpack("<H", self._fields)[0]:
            return None
        offset = self._unpack("<H", self._fields + slot)[0]
        return self._at + offset if offset else None

    def number(self, field: int, form: str) -> int:
        at = self._field(field)
        return 0 if at is None else self._unpack(form, at)[0]

    def table(self, field: int) -> _Table | None:
        at = self._field(field)
        return None if at is None else _Table(self._data, at + self._unpack("<I", at)[0])

    def structs(self, field: int, form: str) -> list[tuple[int, ...]]:
        """A vector of structs."""
        at = self._field(field)
        if at is None:
            return []
        at += self._unpack("<I", at)[0]
        size = self._unpack("<I", at)[0] * struct.calcsize(form)
        if at + 4 + size > len(self._data):
            raise ValueError("its metadata are damaged")
        return list(struct.iter_unpack(form, self._data[at + 4 : at + 4 + size]))


class _Message(NamedTuple):
    content: bytes  # with its prefix of 8 bytes
    table: _Table
    header: _Table  # the schema or record batch
    body: int  # offset of the body in the file
    end: int  # offset of the next message


def _read_message(files: OpenFiles, file: File, at: int) -> _Message | None:
    """The message at a byte of the file; None at the end of the stream."""
    prefix = files.read(file, at, 8) if at + 8 <= file.size else b""
    size = int.from_bytes(prefix[4:], "little", signed=True)
    if at == file.size or prefix == CONTINUATION + bytes(4):
        return None
    if prefix[:4] != CONTINUATION or not 0 < size <= min(limits.ARROW_METADATA_BYTES, file.size - at - 8):
        raise ValueError(f"there is no message at byte {at:,}")
    content = prefix + files.read(file, at + 8, size)
    root = _Table(content[8:], int.from_bytes(content[8:12], "little"))
    header, body = root.table(MESSAGE_HEADER), at + 8 + size
    end = body + root.number(MESSAGE_BODY, "<q")
    if header is None or not body <= end <= file.size:
        raise ValueError(f"the message at byte {at:,} ends after the file, which was perhaps not copied whole")
    return _Message(content, root, header, body, end)


def _stream(files: OpenFiles, file: File, at: int) -> Iterator[_Message]:
    """The record batches of a stream, after its schema."""
    number = 0
    while (message := _read_message(files, file, at)) is not None:
        if message.table.number(MESSAGE_TYPE, "<B") == RECORD_BATCH:
            yield message
        at, number = message.end, number + 1
        if number > limits.ARROW_BATCHES:
            raise ValueError(f"it has more than {limits.ARROW_BATCHES:,} record batches")


def _batches_of_footer(files: OpenFiles, file: File) -> Iterator[_Message]:
    """The record batches of an IPC file, as its footer lists them."""
    end = files.read(file, file.size - 10, 10) if file.size > 18 else b""
    size = int.from_bytes(end[:4], "little", signed=True)
    if end[4:] != MAGIC or not 4 <= size <= min(limits.ARROW_METADATA_BYTES, file.size - 18):
        raise ValueError("it has no footer, so it was perhaps not copied whole")
    footer = files.read(file, file.size - 10 - size, size)
    blocks = _Table(footer, int.from_bytes(footer[:4], "little")).structs(FOOTER_BATCHES, BLOCK)
    if len(blocks) > limits.ARROW_BATCHES:
        raise ValueError(f"it has more than {limits.ARROW_BATCHES:,} record batches")
    for at, _, _ in blocks:
        message = _read_message(files, file, at) if 0 <= at < file.size else None
        if message is None or message.table.number(MESSAGE_TYPE, "<B") != RECORD_BATCH:
            raise ValueError(f"there is no record batch at byte {at:,}")
        yield message


class _Layout:
    """Where a record batch lists the column: its first node and buffer, and by that the buffer of the ids.

    A list has the buffers validity, bounds, and those of its values: validity and data. A list of fixed size has no
    bounds. bounds: the dtype of bounds.
    """

    def __init__(self, schema: Any, column: IdColumn) -> None:
        import pyarrow

        before = [_counts(schema.field(index).type) for index in range(column.position)]
        self.node = sum(nodes for nodes, _ in before)
        self.buffer = sum(buffers for _, buffers in before)
        self.values = 1 + 2 * column.is_list - bool(column.width)
        self.bounds = np.dtype("<i8" if pyarrow.types.is_large_list(schema.field(column.position).type) else "<i4")


def _counts(kind: Any) -> tuple[int, int]:
    """The nodes and buffers of a column of this type, with those of its children. Raises ValueError."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _counts(kind.storage_type)
    own = [count for name, count in BUFFERS.items() if getattr(pyarrow.types, f"is_{name}")(kind)]
    if not own:
        raise ValueError(
            f"the column of ids is after one of type {shortened(kind, 100)}; write the column of ids first"
        )
    children = [_counts(kind.field(index).type) for index in range(kind.num_fields)]
    return 1 + sum(nodes for nodes, _ in children), own[0] + sum(buffers for _, buffers in children)


def _batch(
    files: OpenFiles, file: File, message: _Message, number: int, column: IdColumn, layout: _Layout
) -> ArrowBatch:
    """The column's place in a record batch. Raises UserError or ValueError."""
    where = f"{path_of(file)}, record batch {number}"
    if message.header.table(BATCH_COMPRESSION) is not None:
        raise UserError(Problem(where, "its columns are compressed, so single ids cannot be read", fix=UNCOMPRESSED))
    nodes = message.header.structs(BATCH_NODES, NODE)
    buffers = message.header.structs(BATCH_BUFFERS, BUFFER)
    rows, ids = nodes[layout.node][0], nodes[layout.node + column.is_list][0]
    if nodes[layout.node][1] or nodes[layout.node + column.is_list][1]:
        what = f"the column `{shortened(column.name)}` has nulls"
        raise UserError(Problem(where, what, allowed="integers", fix=WITHOUT_NULLS))
    first = bounds_at = 0
    if column.width:
        ids = rows * column.width
    elif column.is_list:
        bounds_at = _place(message, buffers[layout.buffer + 1], rows + 1, layout.bounds)
        bounds = StoredArray(files, file, layout.bounds, bounds_at, rows + 1)
        first, last = bounds.at(0), bounds.at(rows)
        if not 0 <= first <= last <= ids:
            raise ValueError(f"the lists of record batch {number} do not fit its values")
        ids = last - first
    values_at = _place(message, buffers[layout.buffer + layout.values], first + ids, column.dtype)
    return ArrowBatch(rows, ids, values_at + first * column.dtype.itemsize, bounds_at)


def _place(message: _Message, buffer: tuple[int, ...], count: int, dtype: np.dtype[Any]) -> int:
    """The offset in the file of a buffer of `count` numbers."""
    offset, size = buffer
    if count < 0 or offset < 0 or size < count * dtype.itemsize or message.body + offset + size > message.end:
        raise ValueError("a buffer is outside of its record batch")
    return message.body + offset


def _damaged(file: File, reason: str) -> Problem:
    what = f"not a readable Arrow file: {shortened(reason, 300)}"
    return Problem(path_of(file), what, fix="copy or write the file again")
