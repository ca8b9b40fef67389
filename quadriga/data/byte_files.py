"""The bytes of data files, local or at URLs, decompressed by their suffix. Reads that fail are repeated."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, cast

from quadriga.data.files import File
from quadriga.data.remote_files import open_remote, read_remote
from quadriga.data.sources import require_library
from quadriga.data.stored_arrays import PERMANENT, path_of, read_repeatedly
from quadriga.errors import UserError
from quadriga.reading import opened

BUFFER = 1 << 17  # bytes; `readline` of compressed streams themselves is one Python call per line


class DamagedZstd(Exception):
    """The bytes of a file are not those of zstd, or end early."""


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, DamagedZstd)  # what reading a damaged file raises


@contextmanager
def open_bytes(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed.

    Raises UserError if the file cannot be opened or read, also while the caller reads it; one of `DAMAGED` if it cannot
    be decompressed."""
    with ExitStack() as stack:
        raw: io.RawIOBase = stack.enter_context(FileBytes(file))
        if file.compressed and file.name.lower().endswith(".zst"):
            raw = stack.enter_context(_Zstd(file, raw))
        elif file.compressed:
            raw = cast(io.RawIOBase, stack.enter_context(gzip.GzipFile(fileobj=cast(BinaryIO, raw), mode="rb")))
        yield cast(BinaryIO, io.BufferedReader(raw, BUFFER))


class FileBytes(io.RawIOBase):
    """The bytes as they are stored. After a failed read, the file is opened again."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file, self._at = file, 0
        self._stack = ExitStack()
        self._stream: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Raises UserError if the file cannot be read."""
        try:
            data = self._read(len(buffer))
        except OSError:
            data = read_repeatedly(self._file, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._forget()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._open()
            if self._file.url:
                return read_remote(self._stream, self._at, size)
            self._stream.seek(self._at)
            return self._stream.read(size)
        except BaseException:
            self._forget()
            raise

    def _open(self) -> BinaryIO:
        if self._file.url:
            return self._stack.enter_context(open_remote(self._file))
        try:
            return self._stack.enter_context(opened(self._file.path, what="data file"))
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, PERMANENT):
                raise OSError(cause.errno, cause.strerror or str(cause)) from error
            raise

    def _forget(self) -> None:
        self._stream = None
        self._stack.close()


class _Zstd(io.RawIOBase):
    """The bytes of all frames of a file. The size of their windows is bounded, by 128 MiB."""

    def __init__(self, file: File, raw: io.RawIOBase) -> None:
        super().__init__()
        require_library("pyarrow", path_of(file), "a file compressed by zstd")
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:  # of the format; errors of the file are UserError
            raise DamagedZstd(" ".join(str(error).split())) from error
        buffer[: len(data)] = data
        return len(data)
