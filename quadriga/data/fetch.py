"""Copies the files of a URL into a folder. A later start continues, or checks what is there.

The folder has `.fetch`, which readers of data ignore: `manifest.jsonl` with a line for each copied file, the partial
files, and `incomplete` until all files are there. For each file:

1. Its bytes are written into a partial file, and flushed to the disk.
2. Its size and SHA-256 are added to the manifest.
3. It is renamed. So a file with its final name is complete, and in the manifest.
"""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quadriga import limits
from quadriga.data.fetch_file import (
    PartialFile,
    copy_file,
    reason_of,
    rename_copy,
    sha256_of,
)
from quadriga.data.fetch_manifest import CopiedFile, FetchManifest, Unwritable
from quadriga.data.fetch_stores import FsspecFiles, Store, StoredFile, store_of
from quadriga.data.stored_arrays import PAUSES, PERMANENT
from quadriga.data.tokenize_job import CONTINUE
from quadriga.data.unfinished import FETCH, INCOMPLETE
from quadriga.errors import Fault, Problem, UserError, shortened
from quadriga.log import logger
from quadriga.units import format_bytes

MANIFEST, LOCK = "manifest.jsonl", "lock"
REFRESH_SECONDS = 0.5
EXIT_SECONDS = 5.0  # a thread that hangs in a network read is abandoned: it is a daemon
MOST_PROBLEMS = 10


@dataclass
class FetchProgress:
    """`total_bytes`: of all files, as far as the store says. `bytes`: of them, on this machine. `received`: by this
    start."""

    total_bytes: int
    files: int
    bytes: int = 0
    received: int = 0
    finished: int = 0


@dataclass(frozen=True)
class FetchResult:
    """copied: by this start. kept: copied before, and unchanged since."""

    copied: int
    kept: int
    bytes: int


def fetch_into(
    url: str, out: Path, threads: int, show: Callable[[FetchProgress], None], *, verify: bool = False
) -> FetchResult:
    """Copies the files of `url` that `out` does not have yet. verify: also reads the others, and compares their hashes.

    Raises:
        UserError: there are no files, a copy or its original was changed, other files are in the way, or the disk
            cannot be written. What is complete is kept.
        Fault: the store cannot be read.
    """
    store = store_of(url)
    files = _listed(store)
    _refuse_names(files)
    _refuse_inside(store, out)
    if out.exists() and not out.is_dir():
        raise UserError(Problem("DIR", "is not a folder", str(out)))
    try:
        work = out / FETCH
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work, out), FetchManifest(work / MANIFEST) as manifest:
            (work / INCOMPLETE).touch()
            stop = threading.Event()
            missing = [file for file in files if not _is_kept(store, file, out, manifest.records, verify, stop)]
            _refuse_full_disk(missing, work, out)
            size = _copy_all(store, files, missing, out, manifest, threads, show)
            for left in work.glob("*.part"):  # of files that the store no longer has
                PartialFile(left).remove()
            (work / INCOMPLETE).unlink()
    except Unwritable as error:
        raise UserError(_unwritable(error.path, error.error)) from error
    except OSError as error:
        raise UserError(_unwritable(out, error)) from error
    return FetchResult(len(missing), len(files) - len(missing), size)


def _unwritable(path: Path, error: OSError) -> Problem:
    what = f"cannot be written: {error.strerror or error}"
    return Problem("DIR", what, shortened(path, 400), fix=f"free space or repair it, and {CONTINUE}")


def _listed(store: Store) -> list[StoredFile]:
    for pause in (*PAUSES, None):
        try:
            return store.files()
        except UserError:
            raise
        except PERMANENT as error:
            raise UserError(Problem("URL", f"cannot be read: {reason_of(error)}", store.url)) from error
        except Exception as error:
            reason = reason_of(error)
            if pause is None:
                raise Fault(f"quadriga data fetch: {shortened(store.url, 400)} cannot be listed: {reason}") from error
            logger.warning("fetch: %s cannot be listed (%s); trying again in %g s", store.url, reason, pause)
            threading.Event().wait(pause)
    raise AssertionError


def _refuse_names(files: Sequence[StoredFile]) -> None:
    """Raises UserError for names that would leave the folder, or of which one is a folder of another."""
    if len(files) > limits.DATA_FILES:
        what = f"the URL has {len(files):,} files"
        raise UserError(Problem("URL", what, allowed=f"at most {limits.DATA_FILES:,}", fix="name a folder of it"))
    split = {file.name: file.name.split("/") for file in files}
    folders = {"/".join(parts[:end]) for parts in split.values() for end in range(1, len(parts))}
    bad = {"", ".", ".."}
    wrong = [name for name, parts in split.items() if bad & set(parts) or "\0" in name or parts[0] == FETCH]
    twice = [name for name in split if name in folders]
    problems = [Problem("URL", "has a file whose name cannot be copied", shortened(name, 400)) for name in wrong]
    fix = "name one of them, or a glob"
    problems += [Problem("URL", "has a file and a folder of one name", shortened(name, 400), fix=fix) for name in twice]
    if problems:
        raise UserError(*problems[:MOST_PROBLEMS])


def _refuse_inside(store: Store, out: Path) -> None:
    root = store.local_root if isinstance(store, FsspecFiles) else None
    if root is not None and root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise UserError(Problem("DIR", "is inside of the folder that is copied", str(out), fix="name another folder"))


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    with (work / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(Problem("DIR", "another process is writing this folder", str(out))) from None
        yield


def _is_kept(
    store: Store,
    file: StoredFile,
    out: Path,
    records: Mapping[str, CopiedFile],
    verify: bool,
    stop: threading.Event,
) -> bool:
    """Whether the file was copied before. Raises UserError if the copy, or the file in the store, is another one."""
    path, record = out / file.name, records.get(file.name)
    if not os.path.lexists(path):
        return False
    where = shortened(path, 400)
    if record is None:
        fix = "move it away, or name another folder"
        raise UserError(Problem(where, "is there already, and was not copied by `quadriga data fetch`", fix=fix))
    if record.url != store.url:
        fix = "name another folder"
        raise UserError(Problem(where, f"is there already, and was copied from {shortened(record.url, 400)}", fix=fix))
    if not file.is_same(record.size, record.version):
        fix = "name another folder; or remove this copy, and it is copied again"
        raise UserError(Problem(where, "was changed at the URL since it was copied", fix=fix))
    status = path.stat()
    same = status.st_size == record.size
    if same and (verify or status.st_mtime_ns != record.modified):
        same = sha256_of(path, stop) == record.sha256
    if not same:
        fix = "remove it, and it is copied again"
        raise UserError(Problem(where, "is not what was copied: its bytes were changed since", fix=fix))
    return True


def _refuse_full_disk(missing: Sequence[StoredFile], work: Path, out: Path) -> None:
    need = sum((file.size or 0) - PartialFile.of(work, file.name).length(file) for file in missing)
    if need > (free := shutil.disk_usage(work).free):
        what = f"the files need {format_bytes(need)} more, and the disk has {format_bytes(free)} free"
        raise UserError(Problem("DIR", what, str(out), fix=f"free space, and {CONTINUE}"))


class _Copying:
    """Threads that copy one file after another. Counts what they receive."""

    def __init__(self, store: Store, missing: Sequence[StoredFile], out: Path, manifest: FetchManifest) -> None:
        self._store, self._out, self._manifest = store, out, manifest
        self._left, self._lock = iter(missing), threading.Lock()
        self.ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.lengths: dict[str, int] = {}
        self.received = 0

    def run(self) -> None:
        """One thread. Puts None for each file that is finished, and the error that ends it."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    file = next(self._left, None)
                if file is None:
                    return
                moved_to = partial(self._moved_to, file.name)
                copy_file(self._store, file, self._out / FETCH, self._finish, moved_to, self.stop)
                self.ended.put(None)
        except BaseException as error:  # noqa: BLE001 (every error is passed to the main thread)
            self.ended.put(error)

    def _moved_to(self, name: str, length: int, received: int) -> None:
        with self._lock:
            self.lengths[name] = length
            self.received += received

    def _finish(self, copied: CopiedFile, path: Path) -> None:
        self._manifest.add(copied)
        rename_copy(copied, path, self._out)


def _copy_all(
    store: Store,
    files: Sequence[StoredFile],
    missing: Sequence[StoredFile],
    out: Path,
    manifest: FetchManifest,
    threads: int,
    show: Callable[[FetchProgress], None],
) -> int:
    """Copies the missing files. Returns the bytes of all files."""
    to_copy = {file.name for file in missing}
    kept = sum(manifest.records[file.name].size for file in files if file.name not in to_copy)
    progress = FetchProgress(
        kept + sum(file.size or 0 for file in missing), len(files), finished=len(files) - len(missing)
    )
    copying = _Copying(store, missing, out, manifest)
    running = [threading.Thread(target=copying.run, daemon=True) for _ in range(min(threads, len(missing)))]
    for thread in running:
        thread.start()
    try:
        while progress.finished < len(files):
            with suppress(queue.Empty):
                if (error := copying.ended.get(timeout=REFRESH_SECONDS)) is not None:
                    raise error
                progress.finished += 1
            progress.bytes = kept + sum(copying.lengths.copy().values())
            progress.received = copying.received
            show(progress)
    finally:
        copying.stop.set()
        for thread in running:
            thread.join(EXIT_SECONDS)
    return sum(manifest.records[file.name].size for file in files)
