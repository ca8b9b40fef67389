"""Copies one file of a store: into another name, from where the last start ended, until its bytes are complete.

The partial file is flushed to the disk every `SYNC_BYTES`, and then its length is written down. After a kill or a loss
of power the copy continues there, if size and version of the file in the store are unchanged.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quadriga.data.fetch_manifest import CopiedFile, Unwritable
from quadriga.data.fetch_stores import RangeRefused, Store, StoredFile
from quadriga.data.pieces import sync
from quadriga.data.stored_arrays import PAUSES, PERMANENT
from quadriga.data.tokenize_job import CONTINUE, sync_folder, write_json
from quadriga.errors import Fault, Problem, UserError, shortened
from quadriga.log import logger
from quadriga.reading import read_json_object

SYNC_BYTES = 1 << 25
HASHED_AT_ONCE = 1 << 20


class CopyStopped(Exception):
    """Another file failed, or the user interrupted."""


class _Changed(OSError):
    def __init__(self, now: StoredFile) -> None:
        super().__init__("it was changed while it was copied")
        self.now = now


@dataclass(frozen=True)
class PartialFile:
    """The files of a copy that is not finished, in the folder of the job."""

    path: Path

    @classmethod
    def of(cls, work: Path, name: str) -> PartialFile:
        return cls(work / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.part")

    @property
    def state(self) -> Path:
        return self.path.with_suffix(".json")

    def length(self, file: StoredFile) -> int:
        """The bytes that are safe on the disk and are of this version of the file. Raises UserError."""
        if not self.state.exists() or not self.path.exists():
            return 0
        saved = read_json_object(self.state, what="state")
        size, version, length = saved.get("size"), saved.get("version"), saved.get("length")
        if not isinstance(version, dict) or not version.keys() & file.version.keys():
            return 0  # it is not known whether the file was changed
        if size != file.size or not file.is_same(size, version):
            return 0
        return length if isinstance(length, int) and 0 <= length <= self.path.stat().st_size else 0

    def save(self, file: StoredFile, target: BinaryIO) -> None:
        sync(target)
        content = {"name": file.name, "size": file.size, "version": dict(file.version), "length": target.tell()}
        write_json(self.state, content)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def copy_file(
    store: Store,
    file: StoredFile,
    work: Path,
    finish: Callable[[CopiedFile, Path], None],
    moved_to: Callable[[int, int], None],
    stop: threading.Event,
) -> None:
    """Copies a file into `work`, and calls `finish` with its record and its path there, to publish it.

    moved_to: gets the length of the partial file, and how many of these bytes were received since the last call.

    Raises:
        UserError: the file is gone, or may not be read. Fault: it cannot be read after all repetitions.
        Unwritable: the disk failed. CopyStopped: `stop` was set.
    """
    pauses, longest, before = iter(PAUSES), 0, 0
    partial, where = PartialFile.of(work, file.name), shortened(file.address, 400)

    def count(length: int, received: int) -> None:
        nonlocal longest
        longest = max(longest, length)
        moved_to(length, received)

    while True:
        try:
            finish(_copy(store, file, partial, count, stop), partial.path)
            partial.remove()
            return
        except (UserError, Unwritable, CopyStopped):
            raise
        except PERMANENT as error:
            raise UserError(Problem(where, f"cannot be read: {reason_of(error)}")) from error
        except Exception as error:
            if isinstance(error, _Changed):
                file = error.now
            elif longest > before:  # this attempt came further than those before it
                pauses, before = iter(PAUSES), longest
            if (pause := next(pauses, None)) is None:
                what = f"{where} cannot be read: {reason_of(error)}"
                raise Fault(f"quadriga data fetch: {what}. What was copied is kept: {CONTINUE}") from error
            logger.warning("fetch: %s cannot be read (%s); trying again in %g s", where, reason_of(error), pause)
            stop.wait(pause)


def _copy(
    store: Store,
    file: StoredFile,
    partial: PartialFile,
    moved_to: Callable[[int, int], None],
    stop: threading.Event,
) -> CopiedFile:
    start = partial.length(file)
    try:
        digest = _receive(store, file, partial, start, moved_to, stop)
    except RangeRefused:
        digest = _receive(store, file, partial, 0, moved_to, stop)
    status = partial.path.stat()
    now = store.described(file)
    if not now.is_same(file.size, file.version):
        raise _Changed(now)
    if file.size is not None and status.st_size != file.size:
        if status.st_size > file.size:
            partial.remove()
        raise OSError(f"the store sent {status.st_size:,} bytes, and says that it has {file.size:,}")
    return CopiedFile(file.name, store.url, status.st_size, digest, dict(file.version), status.st_mtime_ns)


def _receive(
    store: Store,
    file: StoredFile,
    partial: PartialFile,
    start: int,
    moved_to: Callable[[int, int], None],
    stop: threading.Event,
) -> str:
    """Writes the bytes from `start` on behind those of the partial file. Returns the SHA-256 of all of them."""
    try:
        digest = hashlib.sha256()
        if start:
            digest = _hashed(partial.path, start, stop)
        target = partial.path.open("r+b" if start else "wb")
    except OSError as error:
        raise Unwritable(partial.path, error) from error
    with target, closing(store.read(file, start)) as blocks:
        at = saved = start
        moved_to(at, 0)
        for index, block in enumerate(blocks):
            if stop.is_set():
                raise CopyStopped
            try:
                if not index:  # only now it is known that the store reads from `start` on
                    target.truncate(start)
                    target.seek(start)
                target.write(block)
                digest.update(block)
                at += len(block)
                if at - saved >= SYNC_BYTES or not index:
                    partial.save(file, target)
                    saved = at
            except OSError as error:
                raise Unwritable(partial.path, error) from error
            moved_to(at, len(block))
        try:
            target.truncate(at)
            target.seek(at)
            partial.save(file, target)
        except OSError as error:
            raise Unwritable(partial.path, error) from error
    return digest.hexdigest()


def _hashed(path: Path, length: int | None, stop: threading.Event) -> hashlib._Hash:
    """The hash of the first `length` bytes of a file; None: of all."""
    digest, left = hashlib.sha256(), path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left:
            if stop.is_set():
                raise CopyStopped
            block = file.read(min(left, HASHED_AT_ONCE))
            if not block:
                raise OSError(f"{path} was cut while it was read")
            digest.update(block)
            left -= len(block)
    return digest


def sha256_of(path: Path, stop: threading.Event) -> str:
    """Raises OSError, and CopyStopped if `stop` is set."""
    return _hashed(path, None, stop).hexdigest()


def rename_copy(copied: CopiedFile, path: Path, out: Path) -> None:
    """Renames a complete file to its name in `out`. Raises Unwritable."""
    target = out / copied.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise Unwritable(target, error) from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shortened(" ".join(str(text).split()) or type(error).__name__, 300)
