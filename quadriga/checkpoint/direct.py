"""Large files written past the system's cache of pages.

Nobody reads a checkpoint back soon, so its pages are not worth the memory that they would take from the data of the
run, and filling new ones costs more processor time than hashing does (`benchmarks/save_cost.py`). Linux alone has
`O_DIRECT`, and not every file system offers it; where it is missing, files are written in the ordinary way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

BLOCK = 1 << 12  # what a disk is written in: positions, lengths and addresses are multiples of it
BUFFER_BYTES = 1 << 22  # bytes that are sent to the disk together


def create(path: Path) -> IO[bytes]:
    """A new file, to be written from its beginning to its end; durable when it has been closed."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        handle, direct = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 0
    return cast(IO[bytes], DirectFile(handle, direct))


class DirectFile:
    """The part of a binary file that writers use. `direct`: the flag that `handle` was opened with, or 0."""

    def __init__(self, handle: int, direct: int) -> None:
        self._handle, self._direct = handle, direct
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # begins at a page of memory, as the disk wants it
        self._filled = self._sent = 0

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        length = len(left)
        while left:
            taken = left[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            left = left[len(taken) :]
            if self._filled == BUFFER_BYTES:
                self.flush()
        return length

    def flush(self) -> None:
        """Send whole blocks; what is less than one stays here until `close`."""
        whole = self._filled - self._filled % BLOCK
        self._send(whole)
        self._buffer.move(0, whole, self._filled - whole)
        self._filled -= whole

    def tell(self) -> int:
        return self._sent + self._filled

    def fileno(self) -> int:
        return self._handle

    def close(self) -> None:
        if self._handle < 0:
            return
        try:
            self.flush()
            if self._filled and self._direct:  # the end of the file is no whole block
                fcntl.fcntl(self._handle, fcntl.F_SETFL, fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~self._direct)
            self._send(self._filled)
            os.fsync(self._handle)
        finally:
            self._close_handle()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self._close_handle()

    def _send(self, length: int) -> None:
        with memoryview(self._buffer) as buffer:
            sent = 0
            while sent < length:
                sent += os.write(self._handle, buffer[sent:length])
        self._sent += length

    def _close_handle(self) -> None:
        os.close(self._handle)
        self._handle = -1
