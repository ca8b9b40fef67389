"""The messages of Arrow files: IPC files, and IPC streams such as those of the library `datasets`.

Only metadata are read here, which are flatbuffers, so that columns can then be read in place. No file is mapped into
memory, because an error of the disk would kill the process then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.stored_arrays import OpenFiles, path_of
from quadriga.errors import Problem, shortened

MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = CONTINUATION + bytes(4)
SCHEMA, DICTIONARY_BATCH, RECORD_BATCH = 1, 2, 3  # types of messages
FOOTER_DICTIONARIES, FOOTER_BATCHES = (
    2,
    3,
)  # fields, by their numbers in Arrow's *.fbs
MESSAGE_TYPE, MESSAGE_HEADER, MESSAGE_BODY = 1, 2, 3
BATCH_ROWS, BATCH_NODES, BATCH_BUFFERS, BATCH_COMPRESSION = 0, 1, 2, 3
SCHEMA_ENDIANNESS = 0
NODE, BUFFER, BLOCK = "<qq", "<qq", "<qi4xq"  # length, nulls; offset, length; offset, bytes of metadata and of body
BUFFERS = {"null": 0, "struct": 1, "fixed_size_list": 1, "list": 2, "large_list": 2, "map": 2, "dictionary": 2}
BUFFERS |= {"primitive": 2, "boolean": 2, "fixed_size_binary": 2, "decimal": 2}
BUFFERS |= {"string": 3, "binary": 3, "large_string": 3, "large_binary": 3}  # by type, without those of its children


class Table:
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

    def table(self, field: int) -> Table | None:
        at = self._field(field)
        return None if at is None else Table(self._data, at + self._unpack("<I", at)[0])

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


class Message(NamedTuple):
    content: bytes  # with its prefix of 8 bytes
    table: Table
    header: Table  # the schema or record batch
    body: int  # offset of the body in the file
    end: int  # offset of the next message
    start: int

    @property
    def type(self) -> int:
        return self.table.number(MESSAGE_TYPE, "<B")


def read_message(files: OpenFiles, file: File, at: int) -> Message | None:
    """The message at a byte of the file; None at the end of the stream."""
    prefix = files.read(file, at, 8) if at + 8 <= file.size else b""
    size = int.from_bytes(prefix[4:], "little", signed=True)
    if at == file.size or prefix == CONTINUATION + bytes(4):
        return None
    if prefix[:4] != CONTINUATION or not 0 < size <= min(limits.ARROW_METADATA_BYTES, file.size - at - 8):
        raise ValueError(f"there is no message at byte {at:,}")
    content = prefix + files.read(file, at + 8, size)
    root = Table(content[8:], int.from_bytes(content[8:12], "little"))
    header, body = root.table(MESSAGE_HEADER), at + 8 + size
    end = body + root.number(MESSAGE_BODY, "<q")
    if header is None or not body <= end <= file.size:
        raise ValueError(f"the message at byte {at:,} ends after the file, which was perhaps not copied whole")
    return Message(content, root, header, body, end, at)


class ArrowMessages(NamedTuple):
    """schema: of the table, from its message `first`. batches: the messages of record batches, and of dictionaries
    before the batches that use them, in order."""

    schema: Any
    first: Message
    batches: Iterator[Message]


def read_messages(files: OpenFiles, file: File) -> ArrowMessages:
    """Raises UserError if the file cannot be read; ValueError, struct.error or one of pyarrow's if it is damaged."""
    import pyarrow

    in_stream = files.read(file, 0, min(8, file.size))[:6] != MAGIC
    first = read_message(files, file, 0 if in_stream else 8)
    if first is None or first.type != SCHEMA:
        raise ValueError("it does not begin with a schema")
    schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(first.content))
    if first.header.number(SCHEMA_ENDIANNESS, "<h"):
        raise ValueError("its numbers are big-endian")
    messages = _batches_of_stream(files, file, first.end) if in_stream else _batches_of_footer(files, file)
    return ArrowMessages(schema, first, messages)


def _batches_of_stream(files: OpenFiles, file: File, at: int) -> Iterator[Message]:
    """The messages of a stream after its schema."""
    number = 0
    while (message := read_message(files, file, at)) is not None:
        if message.type in (RECORD_BATCH, DICTIONARY_BATCH):
            yield message
        at, number = message.end, number + 1
        if number > limits.ARROW_BATCHES:
            raise ValueError(f"it has more than {limits.ARROW_BATCHES:,} record batches")


def _batches_of_footer(files: OpenFiles, file: File) -> Iterator[Message]:
    """The dictionaries and record batches of an IPC file, as its footer lists them."""
    end = files.read(file, file.size - 10, 10) if file.size > 18 else b""
    size = int.from_bytes(end[:4], "little", signed=True)
    if end[4:] != MAGIC or not 4 <= size <= min(limits.ARROW_METADATA_BYTES, file.size - 18):
        raise ValueError("it has no footer, so it was perhaps not copied whole")
    footer = files.read(file, file.size - 10 - size, size)
    table = Table(footer, int.from_bytes(footer[:4], "little"))
    for field, kind in ((FOOTER_DICTIONARIES, DICTIONARY_BATCH), (FOOTER_BATCHES, RECORD_BATCH)):
        blocks = table.structs(field, BLOCK)
        if len(blocks) > limits.ARROW_BATCHES:
            raise ValueError(f"it has more than {limits.ARROW_BATCHES:,} record batches")
        for at, _, _ in blocks:
            message = read_message(files, file, at) if 0 <= at < file.size else None
            if message is None or message.type != kind:
                raise ValueError(f"there is no record batch at byte {at:,}")
            yield message


def node_and_buffer_counts(kind: Any) -> tuple[int, int]:
    """The nodes and buffers of a column of this type, with those of its children. Raises ValueError."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return node_and_buffer_counts(kind.storage_type)
    own = [count for name, count in BUFFERS.items() if getattr(pyarrow.types, f"is_{name}")(kind)]
    if not own:
        raise ValueError(f"it has a column of type {shortened(kind, 100)} before that of the data; write that first")
    children = [node_and_buffer_counts(kind.field(index).type) for index in range(kind.num_fields)]
    return 1 + sum(nodes for nodes, _ in children), own[0] + sum(buffers for _, buffers in children)


def buffer_place(message: Message, buffer: tuple[int, ...], size: int) -> int:
    """The offset in the file of a buffer of at least `size` bytes."""
    offset, length = buffer
    if size < 0 or offset < 0 or length < size or message.body + offset + length > message.end:
        raise ValueError("a buffer is outside of its record batch")
    return message.body + offset


def damaged_arrow(file: File, error: Exception | str, where: str = "") -> Problem:
    reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
    return Problem(path_of(file) + where, f"not a readable Arrow file: {reason}", fix="copy or write the file again")
