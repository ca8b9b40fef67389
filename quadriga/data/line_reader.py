"""The bytes of text and JSON-lines files: opened, decompressed, cut into lines of bounded length, decoded."""

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
    """The file's bytes, decompressed. Raises UserError where the file cannot be opened or read."""
    with opened(file.path, what="data file") as plain:
        if file.compressed:
            with gzip.GzipFile(fileobj=plain, mode="rb") as stream:
                # GzipFile's own `readline` is a Python call a line.
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 17))
        else:
            yield plain


def lines_of(file: File, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Every line with its offset, of those whose first byte lies in [start, end); of a compressed file, all.

    None stands for a line that is longer than `limits.DOCUMENT_BYTES`.
    Raises UserError where a compressed file is broken, or no line end is found within `limits.LINE_SKIPPED_BYTES`.
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
    """Read to the end of the line; how many bytes that were."""
    passed = 0
    while piece := stream.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
        if passed > limits.LINE_SKIPPED_BYTES:
            what = f"the line that holds byte {begins:,} has no end within {limits.LINE_SKIPPED_BYTES:,} bytes"
            fix = "write one JSON object a line; or check whether this is a data file"
            raise UserError(Problem(shortened(file.path, NAME_SHOWN), what, fix=fix))
    return passed


def broken_gzip(file: File, lines: int, error: Exception) -> Problem:
    """What is wrong with a compressed file that broke off after so many lines. Raises what it is, if no such file."""
    refuse_if_foreign(file, "text")
    truncated = isinstance(error, EOFError)
    what = "the compressed file is cut off" if truncated else f"the compressed file is damaged ({error})"
    where = f"{shortened(file.path, NAME_SHOWN)}, after line {lines}"
    return Problem(where, what, fix="fetch or write the file again")


def line_at(file: File, offset: int) -> int:
    """The number of the line (from 1) that holds the byte at `offset` of the decompressed file."""
    lines = 1
    with open_bytes(file) as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 16))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def format_location(file: File, offset: int) -> str:
    """Where in the file a byte lies, in the words of a message: the line, or the byte (of the decompressed file) where
    counting the lines before it would take long or cannot be done. Raises UserError where the file cannot be read."""
    name = shortened(file.path, NAME_SHOWN)
    if offset <= (limits.LINES_COUNTED_PACKED if file.compressed else limits.LINES_COUNTED):
        with suppress(*BROKEN_GZIP):
            return f"{name}, line {line_at(file, offset)}"
    return f"{name}, byte {offset:,}"


def cut_points(size: int, *, streams: int, least: int, most: int) -> range:
    """Where a file of `size` bytes is cut, nominally: at least four shards for each stream, if they stay above `least`.

    At most about 2^17 shards, since each epoch sorts them.
    """
    return range(0, size, min(max(size // (4 * streams), least), max(most, size >> 17)))
