"""Arrays of numbers inside files, read by range. Neither memory nor open files grow with the data.

Files are read by `pread`, not mapped into memory: for a mapped file, an error of the disk or a file that was cut while
it is read would kill the process by SIGBUS. `pread` returns an error instead, and the file can be named.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.stalls import being_read
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger

T = TypeVar("T")
BLOCK = 4096  # numbers that the last step of a search reads at once
PAUSES = (0.1, 1.0, 5.0)  # seconds before a failed read is tried again
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class _Descriptor:
    """An open file. `users`: reads in progress, during which it stays open."""

    def __init__(self, number: int) -> None:
        self.number, self.users = number, 0


class OpenFiles:
    """Reads ranges of many files, with at most `most` of them open. Any thread can read any file.

    The least recently used file is closed first. Only reads in progress can keep more files open, one per thread.
    """

    def __init__(self, most: int = limits.TOKEN_FILES_OPEN) -> None:
        self._most = most
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, file: File, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file, all of them. Failed reads are repeated for some seconds.

        Raises:
            UserError: the file cannot be read, ends before the range does, or has another size than `file.size`.
        """

        def read() -> bytes:
            try:
                with being_read(lambda: path_of(file)):
                    return self._read(file, offset, size)
            except OSError:
                self._forget(file)  # a new descriptor, because one of a network file system can become invalid
                raise

        return read_repeatedly(file, read)

    def close(self) -> None:
        """Closes all files. Files that are being read are closed after the read."""
        with self._lock:
            self._closed = True
            self._evict(0)

    __del__ = close

    def _read(self, file: File, offset: int, size: int) -> bytes:
        descriptor = self._acquire(file)
        try:
            data = os.pread(descriptor.number, size, offset)
            parts, length = [data], len(data)
            while length < size:  # at the end of the file, or beyond what one call reads (2 GiB)
                data = os.pread(descriptor.number, size - length, offset + length)
                if not data:
                    what = f"the file ends at byte {offset + length:,}; it had {file.size:,} bytes when it was opened"
                    raise UserError(Problem(path_of(file), what, fix="restore the file"))
                parts.append(data)
                length += len(data)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            with self._lock:
                descriptor.users -= 1
                if self._closed:
                    self._evict(0)

    def _acquire(self, file: File) -> _Descriptor:
        path = os.fspath(file.path)
        with self._lock:
            if self._closed:
                raise ValueError("the token files are closed")
            if (known := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                known.users += 1
                return known
            self._evict(self._most - 1)
        number = _open_unchanged(file)
        with self._lock:
            known = self._open.setdefault(path, _Descriptor(number))
            known.users += 1
        if known.number != number:
            os.close(number)  # another thread opened the file meanwhile
        return known

    def _forget(self, file: File) -> None:
        with self._lock:
            known = self._open.get(os.fspath(file.path))
            if known is not None and not known.users:
                os.close(self._open.pop(os.fspath(file.path)).number)

    def _evict(self, most: int) -> None:
        """Closes unused files, the least recently used first, until at most `most` are open. Called with the lock."""
        while len(self._open) > most:
            unused = next((path for path, known in self._open.items() if not known.users), None)
            if unused is None:
                return
            os.close(self._open.pop(unused).number)


def read_repeatedly(file: File, read: Callable[[], T]) -> T:
    """What `read` returns. A read that fails is repeated for some seconds.

    Raises:
        UserError: the file cannot be read.
        OSError: one without `errno`, as pyarrow raises for damaged files.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None:
                raise
            reason = error.strerror or str(error)
            if pause is None or isinstance(error, PERMANENT):
                raise UserError(Problem(path_of(file), f"the file cannot be read: {reason}")) from error
            logger.warning("data: %s cannot be read (%s); trying again in %g s", path_of(file), reason, pause)
            time.sleep(pause)
    raise AssertionError


def path_of(file: File) -> str:
    """The path or URL of a file for a message."""
    return shortened(file.url or file.path, 400)


def _open_unchanged(file: File) -> int:
    """A descriptor of the file, which must be a regular file of `file.size` bytes."""
    number = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size == file.size:
        return number
    os.close(number)
    what = f"the file was changed: it has {status.st_size:,} bytes, and had {file.size:,} when the run began"
    raise UserError(Problem(path_of(file), what, fix="restore the file, or start again"))


@dataclass(frozen=True, slots=True)
class StoredArray:
    """`count` numbers of `dtype`, from byte `offset` of a file on."""

    files: OpenFiles
    file: File
    dtype: np.dtype[Any]
    offset: int
    count: int

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Numbers [start, stop), in the dtype of the file, read-only. Raises UserError as `OpenFiles.read`."""
        size = self.dtype.itemsize
        return np.frombuffer(self.files.read(self.file, self.offset + start * size, (stop - start) * size), self.dtype)

    def at(self, index: int) -> int:
        return int(self.read(index, index + 1)[0])

    def search(self, value: int, near: int = 0) -> int:
        """How many numbers are at most `value`, in an array that is sorted. `near`: no more than the answer, close to
        it if that is known. If the array is not sorted, the answer is any number up to `count`."""
        low, high, step = near, self.count, BLOCK
        while near and low + step < high and step < 64 * BLOCK:  # first close to `near`
            if self.at(low + step) > value:
                high = low + step
                break
            low, step = low + step, 4 * step
        while high - low > BLOCK:
            middle = (low + high) // 2
            if self.at(middle) > value:
                high = middle
            else:
                low = middle
        return low + int(np.searchsorted(self.read(low, high), value, side="right"))


@dataclass(frozen=True, slots=True)
class LoadedArray:
    """The interface of `StoredArray` for an array in memory."""

    values: npt.NDArray[Any]

    @property
    def count(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.values[start:stop]

    def search(self, value: int, near: int = 0) -> int:
        return int(np.searchsorted(self.values, value, side="right"))
