"""Files that a run appends to: whole pieces or nothing, also on a full disk; and way for them, whatever lies there."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from quadriga.errors import printable
from quadriga.log import logger

NOT_BLOCKING = os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO that nobody reads would hold up who opens it


class Appender:
    """Appends pieces of bytes, each whole or, where the write fails, not at all. Raises OSError where it fails."""

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
            with suppress(OSError):  # what was written of it must not stand before the next piece
                os.ftruncate(self._handle, before)
            raise

    def close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)


def ensure_appendable(path: Path) -> None:
    """See to it that a run can append to `path`: what lies there and is no file to read and write is set aside.

    Raises OSError where that cannot be done.
    """
    try:
        handle = os.open(path, os.O_RDWR | NOT_BLOCKING)
    except OSError as error:
        if os.path.lexists(path):  # a folder, a link that leads nowhere, no permission, a disk that does not answer
            set_aside(path, error.strerror or str(error))
        return
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            set_aside(path, "no regular file")
    finally:
        os.close(handle)


def set_aside(path: Path, why: str) -> None:
    """Rename what lies at `path`, so that a run can begin a file of this name. Raises OSError where that fails."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.unreadable-{number}")):
        number += 1
    path.rename(aside)
    logger.warning("%s cannot be gone on with (%s): set aside as %s", path, printable(why), aside.name)
