"""Reads text and JSON-lines files: opens and decompresses them, and splits them into lines of bounded length."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.recognize import refuse_if_foreign
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import opened

NAME_SHOWN = 400  # characters of a path in a message
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


@contextmanager
def open_bytes(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises UserError if the file cannot be opened or read."""
    with opened(file.path, what="data file") as plain:
        if file.compressed:
            with gzip.GzipFile(fileobj=plain, mode="rb") as stream:
                # `readline` of GzipFile itself is one Python call per line.
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 17))
        else:
            yield plain


def lines_of(file: File, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Yields (offset, line) of the lines whose first byte is in [start, end); of all lines of a compressed file.

    A line that is longer than `limits.DOCUMENT_BYTES` is None.
    Raises UserError if a compressed file is damaged, or if there is no line end within `limits.LINE_SKIPPED_BYTES`.
    """
    number, longest = 0, limits.DOCUMENT_BYTES
    with open_bytes(file) as stream:
        offset = start
        if start > 0:
            stream.seek(start - 1)
            offset += _to_line_end(stream, file, start) - 1
        try:
            while (end is None or offset < end) and (line := stream.readline(longest + 1)):
                number += 1
                if len(line) <= longest or line.endswith(b"\n"):
                    yield offset, line
                    offset += len(line)
                else:
                    begins = offset
                    offset += len(line) + _to_line_end(stream, file, begins)
                    yield begins, None
        except BROKEN_GZIP as error:
            raise UserError(broken_gzip(file, number, error)) from error


def _to_line_end(stream: BinaryIO, file: File, begins: int) -> int:
    """Reads to the end of the line. Returns the number of bytes read."""
    passed = 0
    while piece := stream.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
        if passed > limits.LINE_SKIPPED_BYTES:
            what = f"the line that holds byte {begins:,} has no end within {limits.LINE_SKIPPED_BYTES:,} bytes"
            fix = "write one JSON object per line; or check whether this is a data file"
            raise UserError(Problem(shortened(file.path, NAME_SHOWN), what, fix=fix))
    return passed


def broken_gzip(file: File, lines: int, error: Exception) -> Problem:
    """The problem of a compressed file whose reading failed after `lines` lines. Raises UserError if the file has
    another format."""
    refuse_if_foreign(file, "text")
    truncated = isinstance(error, EOFError)
    what = "the compressed file is truncated" if truncated else f"the compressed file is damaged ({error})"
    where = f"{shortened(file.path, NAME_SHOWN)}, after line {lines}"
    return Problem(where, what, fix="download or write the file again")


def line_at(file: File, offset: int) -> int:
    """The number (from 1) of the line with the byte at `offset` of the decompressed file."""
    lines = 1
    with open_bytes(file) as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 16))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def format_location(file: File, offset: int) -> str:
    """The position of a byte for a message: the line, or the byte (of the decompressed file) if counting the lines
    before it would take long or is not possible. Raises UserError if the file cannot be read."""
    name = shortened(file.path, NAME_SHOWN)
    if offset <= (limits.LINES_COUNTED_PACKED if file.compressed else limits.LINES_COUNTED):
        with suppress(*BROKEN_GZIP):
            return f"{name}, line {line_at(file, offset)}"
    return f"{name}, byte {offset:,}"


def cut_points(size: int, *, streams: int, least: int, most: int) -> range:
    """The nominal cuts of a file of `size` bytes: at least four shards per stream, if they are above `least` bytes.

    At most about 2^17 shards, because each epoch sorts them.
    """
    return range(0, size, min(max(size // (4 * streams), least), max(most, size >> 17)))
