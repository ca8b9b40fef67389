"""Plain text files. A file is one document. A long file is cut at line ends into segments for several streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from quadriga.data.byte_files import DAMAGED, open_bytes
from quadriga.data.files import File
from quadriga.data.jsonl import ByteRangeSource, line_at
from quadriga.data.recognize import LFS_POINTER, damaged_file, refuse_if_foreign
from quadriga.data.sources import Document, Record, bad_record
from quadriga.errors import UserError

LEAST_SEGMENT = 1 << 10
MOST_SEGMENT = 1 << 16
NO_TEXT = (LFS_POINTER, b"%PDF-")  # beginnings of files whose bytes are valid text, but which are not text files
LOOK_AHEAD = 1 << 12  # bytes that a cut can move to reach the end of a line; at least one character (4 bytes)


class TextSource(ByteRangeSource):
    """A shard is a segment of a plain file, which begins at the first line end after its cut."""

    def __init__(self, files: Sequence[File], *, streams: int = 1) -> None:
        super().__init__("text", files, None, streams, LEAST_SEGMENT, MOST_SEGMENT)

    def read(self, shard: int) -> Iterator[Record]:
        index, start, end = self._spans[shard]
        file = self.files[index]
        if file.compressed:
            yield from _stream(file, shard)
            return
        # One record, except in the last segment of a file that has grown since it was cut.
        for first, last in pairwise([*range(start, end, self._step), end]):
            yield from _segment(file, shard, first, last)

    def parse(self, record: Record) -> Document:
        file = self.file_of(record.shard)
        data = record.data
        assert isinstance(data, bytes)
        if b"\0" in data or (record.begins and data.startswith(NO_TEXT)):
            refuse_if_foreign(file, "text")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            refuse_if_foreign(file, "text")
            at = record._replace(number=record.number + error.start)
            fix = "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
            raise bad_record(self, at, f"byte 0x{data[error.start]:02x} is not UTF-8", fix=fix) from error
        return Document(text.removeprefix("\ufeff") if record.begins else text, record.begins, record.ends)


def _segment(file: File, shard: int, start: int, end: int) -> Iterator[Record]:
    with open_bytes(file) as stream:
        stream.seek(max(start - 1, 0))
        data = stream.read(end + LOOK_AHEAD - max(start - 1, 0))
    origin = max(start - 1, 0)
    first = 0 if start == 0 else origin + _cut(data, start - origin)
    last = end if end == file.size else origin + _cut(data, end - origin)
    if first < last:
        yield Record(shard, first, data[first - origin : last - origin], first == 0, last == file.size)


def _cut(data: bytes, at: int) -> int:
    """The first position from `at` on after a line end, within LOOK_AHEAD bytes; else the next character's start."""
    newline = data.find(b"\n", at - 1, at - 1 + LOOK_AHEAD)
    if newline >= 0:
        return newline + 1
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


def _stream(file: File, shard: int) -> Iterator[Record]:
    """Segments of a compressed file, each of about MOST_SEGMENT bytes."""
    offset, rest = 0, b""
    with open_bytes(file) as stream:
        while True:
            try:
                chunk = stream.read(MOST_SEGMENT)
            except DAMAGED as error:
                lines = line_at(file, offset + len(rest)) - 1
                raise UserError(damaged_file(file, lines, error)) from error
            if not chunk:
                break
            # A segment is yielded only if more text follows, so that the last one can be marked as the last.
            if rest:
                end = _cut(rest + chunk[:LOOK_AHEAD], len(rest))
                whole = rest + chunk
                if end < len(whole):
                    yield Record(shard, offset, whole[:end], offset == 0, False)
                    offset, rest = offset + end, whole[end:]
                    continue
                chunk = whole
            rest = chunk
        if rest:
            yield Record(shard, offset, rest, offset == 0, True)
