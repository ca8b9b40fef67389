"""Storage of checkpoints: a folder of this machine, or an object store (URL), with one interface.

On a file system, a rename is atomic and publishes a whole folder. An object store has no rename: there, one small
object, written last, publishes everything that was written before (see `folder.py`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar, cast

from quadriga import limits
from quadriga.file_systems import file_system_of

T = TypeVar("T")
Location = str | os.PathLike[str]
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not retried
BLOCK = 1 << 12  # bytes; with O_DIRECT, positions, lengths and addresses are multiples of it
BUFFER_BYTES = 1 << 22  # bytes per write


def is_url(location: Location) -> bool:
    return "://" in str(location)


def files_at(location: Location, retries: int = 5) -> Files:
    """The file system of a path or URL; `file://` is this machine. Raises UserError if a protocol has no driver."""
    if not is_url(location) or str(location).startswith("file://"):
        return LocalFiles()
    system, _ = file_system_of(str(location), "checkpoint.folder or checkpoint.initial_load_path")
    return ObjectFiles(system, retries)


def local(location: Location) -> Path:
    """The path of a `file://` URL or a path."""
    return Path(str(location).removeprefix("file://"))


def join(folder: Location, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def try_to_write(folder: Location) -> None:
    """Writes a small file and removes it again. Raises OSError if this fails."""
    files, path = files_at(folder), f"{str(folder).rstrip('/')}/.try"
    files.make(folder)
    if files.exists(path):  # of a killed run; or a FIFO, for example, whose opening would block
        files.remove(path)
    files.write(path, b"may this folder be written?")
    files.remove(path)


class LocalFiles:
    """Folders of this machine, including shared file systems. Paths are complete paths or URLs, as in `ObjectFiles`.
    All methods raise OSError on failure."""

    renames = True  # whether it can rename a folder atomically

    def open(self, path: Location, mode: str) -> IO[bytes]:
        return open_regular(local(path)) if mode == "rb" else cast(IO[bytes], local(path).open(mode))

    def create(self, path: Location) -> IO[bytes]:
        """Opens a new large file for sequential writing. Its content is durable after `close`."""
        return create_direct(local(path))

    def names(self, folder: Location) -> list[str]:
        """The names in a folder, sorted; [] if the folder does not exist."""
        return sorted(os.listdir(local(folder))) if local(folder).is_dir() else []

    def exists(self, path: Location) -> bool:
        """Whether the name exists; also true for a link with a missing target."""
        try:
            os.lstat(local(path))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError:  # it exists, but cannot be inspected
            return True
        return True

    def is_file(self, path: Location) -> bool:
        return local(path).is_file()

    def is_folder(self, path: Location) -> bool:
        """Whether it is a folder itself, not a link to one."""
        return stat.S_ISDIR(os.lstat(local(path)).st_mode)

    def is_link(self, path: Location) -> bool:
        """Whether it is a link, which could lead to any file of this machine."""
        return os.path.islink(local(path))

    def size(self, path: Location) -> int:
        """The size of a regular file in bytes. Raises OSError for anything else."""
        status = os.stat(local(path))
        _refuse_other_kinds(status.st_mode, path)
        return status.st_size

    def read(self, path: Location) -> bytes:
        """The content of a small file. Raises OSError if it is longer than `limits.JSON_BYTES`."""
        with self.open(path, "rb") as file:
            content = file.read(limits.JSON_BYTES + 1)
        _refuse_longer(len(content), path)
        return content

    def write(self, path: Location, data: bytes) -> None:
        """Writes a small file. On return, it and the names of all files in its folder are durable."""
        with local(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.flush_names(local(path).parent)

    def make(self, folder: Location) -> None:
        """Creates a folder and its missing parents, durably."""
        path = local(folder).absolute()
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in reversed(missing):
            self.flush_names(each.parent)

    def rename(self, path: Location, new: Location) -> None:
        """Renames a file. If `renames`, also a folder, and atomically."""
        local(path).rename(local(new))

    def remove(self, path: Location) -> None:
        """Removes a file, a link (never its target), or a folder with its content."""
        if self.is_folder(path):
            shutil.rmtree(local(path), onerror=_ignore_missing)
        else:
            local(path).unlink()

    def flush_names(self, folder: Location) -> None:
        """Makes the names in a folder durable. To flush a file covers only its content."""
        handle = os.open(local(folder), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def retried(self, work: Callable[[], T]) -> T:
        """The result of `work`, which is repeated if the storage fails temporarily."""
        return work()  # a disk error is reported, not retried


def create_direct(path: Path) -> IO[bytes]:
    """Opens a new file for sequential writing without the page cache of the system (`O_DIRECT`).

    A checkpoint is not read back soon, so its pages would take memory from the training data without use. Filling new
    pages also costs more processor time than hashing (`benchmarks/save_cost.py`). Only Linux has `O_DIRECT`, and not
    every file system supports it; without it, files are written with buffering. Raises OSError.
    """
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file for reading, without blocking: a FIFO without a writer would block the caller forever.

    Raises OSError if it is not a regular file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(os.fstat(handle).st_mode, path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _refuse_other_kinds(mode: int, path: Location) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _refuse_longer(length: int, path: Location) -> None:
    if length > limits.JSON_BYTES:
        raise OSError(errno.EFBIG, f"longer than {limits.JSON_BYTES:,} bytes", str(path))


def _ignore_missing(_call: Any, _path: str, failure: Any) -> None:
    """Error handler of `rmtree`: ignores a file that another process has removed meanwhile."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


class ObjectFiles:
    """An object store, with fsspec. Requests that fail with a temporary error are repeated up to `retries` times."""

    renames = False

    def __init__(self, system: Any, retries: int) -> None:
        self._system, self._retries = system, retries

    def open(self, path: Location, mode: str) -> IO[bytes]:
        return cast(IO[bytes], self._system.open(str(path), mode))

    def create(self, path: Location) -> IO[bytes]:
        return self.open(path, "wb")

    def names(self, folder: Location) -> list[str]:
        def list_names() -> list[str]:
            self._system.invalidate_cache()
            try:
                found = self._system.ls(str(folder), detail=False)
            except FileNotFoundError:
                return []
            return sorted({path.rstrip("/").rpartition("/")[2] for path in found})

        return self.retried(list_names)

    def exists(self, path: Location) -> bool:
        return self.retried(lambda: bool(self._system.exists(str(path))))

    def is_file(self, path: Location) -> bool:
        return self.retried(lambda: bool(self._system.isfile(str(path))))

    def is_folder(self, path: Location) -> bool:
        return True  # a prefix of names; a store has no links

    def is_link(self, path: Location) -> bool:
        return False

    def size(self, path: Location) -> int:
        return self.retried(lambda: int(self._system.size(str(path))))

    def read(self, path: Location) -> bytes:
        _refuse_longer(self.size(path), path)
        return self.retried(lambda: bytes(self._system.cat_file(str(path))))

    def write(self, path: Location, data: bytes) -> None:
        self.retried(lambda: self._system.pipe_file(str(path), data))

    def make(self, folder: Location) -> None:
        self.retried(lambda: self._system.makedirs(str(folder), exist_ok=True))

    def rename(self, path: Location, new: Location) -> None:
        self.write(new, self.read(path))
        self.remove(path)

    def remove(self, path: Location) -> None:
        def remove() -> None:
            self._system.invalidate_cache()
            try:
                self._system.rm(str(path), recursive=True)
            except FileNotFoundError:  # checked only now, because it costs one or two requests
                if self._system.exists(str(path)):
                    raise

        self.retried(remove)

    def flush_names(self, folder: Location) -> None:
        return None  # an object is durable when its request has returned

    def retried(self, work: Callable[[], T]) -> T:
        pause = FIRST_PAUSE_SECONDS
        for left in reversed(range(self._retries + 1)):
            try:
                return work()
            except PERMANENT_ERRORS:
                raise
            except OSError:  # the drivers of fsspec convert their errors to it
                if not left:
                    raise
            time.sleep(pause * (0.5 + random.random()))  # random, so that not all ranks retry at once
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")


Files: TypeAlias = LocalFiles | ObjectFiles
