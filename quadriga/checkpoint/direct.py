"""Writes large files without the page cache of the system (`O_DIRECT`).

A checkpoint is not read back soon, so its pages would take memory from the training data without use. Filling new pages
also costs more processor time than hashing (`benchmarks/save_cost.py`). Only Linux has `O_DIRECT`, and not every file
system supports it; without it, files are written with buffering.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

BLOCK = 1 << 12  # bytes; with O_DIRECT, positions, lengths and addresses are multiples of it
BUFFER_BYTES = 1 << 22  # bytes per write


def create(path: Path) -> IO[bytes]:
    """Opens a new file for sequential writing. Its content is durable after `close`. Raises OSError."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        handle, direct = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 0
    return cast(IO[bytes], DirectFile(handle, direct))


class DirectFile:
    """The methods of a binary file that writers use. `direct`: the flag that `handle` was opened with, or 0."""

    def __init__(self, handle: int, direct: int) -> None:
        self._handle, self._direct = handle, direct
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # aligned to a page, as O_DIRECT requires
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
        """Writes whole blocks. A partial block stays in the buffer until `close`."""
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
            if self._filled and self._direct:  # the last block is partial, which O_DIRECT does not allow
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
