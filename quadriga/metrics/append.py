"""Files to which a run appends: complete writes or none, also on a full disk. Anything else at a path is set aside."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from quadriga.errors import printable
from quadriga.log import logger

NOT_BLOCKING = os.O_NONBLOCK | os.O_CLOEXEC  # opening a FIFO without a reader would block


class Appender:
    """Appends bytes, each write completely or, if it fails, not at all. Raises OSError if a write fails."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOT_BLOCKING, 0o644)

    def write(self, data: bytes) -> None:
        before = os.fstat(self._handle).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            with suppress(OSError):  # a partial write must not precede the next one
                os.ftruncate(self._handle, before)
            raise

    def close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)


def ensure_appendable(path: Path) -> None:
    """Make sure that a run can append to `path`: anything there that is not a readable, writable file is set aside.

    Raises OSError if that fails.
    """
    try:
        handle = os.open(path, os.O_RDWR | NOT_BLOCKING)
    except OSError as error:
        if os.path.lexists(path):  # a folder, a dangling link, no permission, a disk that does not answer
            set_aside(path, error.strerror or str(error))
        return
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            set_aside(path, "no regular file")
    finally:
        os.close(handle)


def set_aside(path: Path, why: str) -> None:
    """Rename what is at `path`, so that a run can create a file with this name. Raises OSError if that fails."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.unreadable-{number}")):
        number += 1
    path.rename(aside)
    logger.warning("%s cannot be appended to (%s): set aside as %s", path, printable(why), aside.name)
