"""Data files at URLs, with the file systems of fsspec. Credentials are those of fsspec's environment."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from quadriga.config.assets import DATASETS, DRIVERS, PACKED
from quadriga.data.files import MOST_NAMES, File
from quadriga.data.stored_arrays import PERMANENT, path_of, read_repeatedly
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import format_some

BLOCK = 1 << 18  # bytes of one request, at least
GLOB = "*?["
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "Content-MD5",
)  # names of what identifies the content
TIMES = ("LastModified", "last_modified", "mtime", "updated", "Last-Modified", "created")


def find_remote_files(kind: str, url: str, key: str) -> tuple[File, ...]:
    """The files of a URL, of a folder, or of a glob, as `files.find_files`. Raises UserError."""
    system, root = _system(url, key)
    listed = File(Path(url), url, 0, compressed=False, url=url)
    try:
        found = read_repeatedly(listed, lambda: _retried(lambda: _list(system, root, DATASETS[kind].suffixes)))
    except UserError as error:
        raise UserError(*(Problem(key, each.what, url, fix=each.fix) for each in error.problems)) from error
    if not found:
        what, suffixes = f"nothing there is read as {kind}", ", ".join(f"*{each}" for each in DATASETS[kind].suffixes)
        raise UserError(Problem(key, what, url, allowed=f"a file, a folder or a glob of {suffixes}"))
    # Names are relative to the folder, or to the deepest one that has all files, as those of local files.
    in_folder = set(found) != {root} and not any(sign in root for sign in GLOB)
    folders = [name.split("/")[:-1] for name in found]
    depth = len(root.rstrip("/").split("/")) if in_folder else _common(folders)
    files = [
        _described(system, name, "/".join(name.split("/")[depth:]), facts) for name, facts in sorted(found.items())
    ]
    if unknown := [file.name for file in files if file.size < 0]:
        what = f"the server does not state the size of {format_some([shortened(name) for name in unknown], MOST_NAMES)}"
        raise UserError(Problem(key, what, url, fix="copy the files to this machine"))
    if not sum(file.size for file in files):
        raise UserError(Problem(key, "every file is empty", url))
    return tuple(files)


def _common(folders: Sequence[Sequence[str]]) -> int:
    """How many parts all paths have in common at their beginnings."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))


def open_remote(file: File) -> BinaryIO:
    """The bytes of a file. Raises UserError if it is not the one that was listed; OSError."""
    system, path = _system(file.url, file.url)
    stream: BinaryIO = _retried(lambda: system.open(path, "rb", block_size=BLOCK))
    size = getattr(stream, "size", None)
    if size is not None and size != file.size:
        stream.close()
        what = f"the file was changed: it has {size:,} bytes, and had {file.size:,} when the run began"
        raise UserError(Problem(path_of(file), what, fix="restore the file, or start again"))
    return stream


def read_remote(stream: BinaryIO, at: int, size: int) -> bytes:
    """Up to `size` bytes from `at` on. Raises OSError."""

    def read() -> bytes:
        stream.seek(at)
        return stream.read(size)

    return bytes(_retried(read))


def _retried(call: Any) -> Any:
    """What `call` returns. Raises OSError with an errno for all errors of drivers, so that the read is repeated."""
    try:
        return call()
    except PERMANENT as error:
        if error.errno is None:  # as drivers raise it
            raise type(error)(errno.ENOENT, "there is no such file, or no access to it") from error
        raise
    except Exception as error:
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise OSError(errno.EIO, reason) from error


def _system(url: str, key: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        driver = DRIVERS.get(url.partition("://")[0])
        fix = f"pip install {driver}" if driver else "use a protocol of fsspec, or copy the files to this machine"
        raise UserError(Problem(key, f"cannot be reached: {shortened(error, 300)}", url, fix=fix)) from None
    return system, path


def _list(system: Any, root: str, suffixes: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """The files by name, with what the file system says of them."""
    if any(sign in root for sign in GLOB):
        found = system.glob(root, detail=True)
        return {name: facts for name, facts in found.items() if facts.get("type") == "file"}
    facts = system.info(root)
    if facts.get("type") == "file":
        return {root: facts}
    prefix = len(root.rstrip("/")) + 1
    return {
        name: facts
        for name, facts in system.find(root, detail=True).items()
        if name.lower().endswith(suffixes) and not any(part.startswith(".") for part in name[prefix:].split("/"))
    }


def _described(system: Any, path: str, name: str, facts: Mapping[str, Any]) -> File:
    size = facts.get("size")
    version = next((str(facts[each]) for each in VERSIONS if facts.get(each)), "")
    packed = os.path.splitext(path)[1].lower() in PACKED
    modified = next((time for each in TIMES if (time := _nanoseconds(facts.get(each)))), 0)
    url = system.unstrip_protocol(path)
    return File(Path(path), name, -1 if size is None else int(size), packed, modified, version, url)


def _nanoseconds(time: object) -> int:
    """A time of any form since the epoch; 0 if it is none."""
    try:
        if isinstance(time, str):
            time = datetime.fromisoformat(time) if "T" in time[:12] else parsedate_to_datetime(time)
        if isinstance(time, datetime):
            time = time.timestamp()
        return int(time * 1e9) if isinstance(time, int | float) else 0
    except (ValueError, OverflowError):
        return 0
