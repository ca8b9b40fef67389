"""Where `quadriga data fetch` copies from. A store lists its files with their versions, and reads from any byte.

HTTP needs no driver of fsspec here: one request reads the rest of a file, and the answer says whether it begins at the
byte that was asked for.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from quadriga.errors import Problem, UserError, shortened
from quadriga.file_systems import file_system_of

READ_BYTES = 1 << 22  # of one read, or of one request of an object store
TIMEOUT_SECONDS = 60.0  # without any byte
SIGNS = "*?["  # of a pattern
# What fsspec's drivers say about the content of a file; if they say nothing of it, about its time.
CONTENT_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "generation", "version_id")
TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


class RangeRefused(Exception):
    """The store reads this file only from its beginning."""


@dataclass(frozen=True)
class StoredFile:
    """name: relative to what was asked for, with `/`. address: in the store. size: in bytes; None if the store does not
    say. version: what the store says about the content (an ETag, a time); equal for an unchanged file."""

    name: str
    address: str
    size: int | None
    version: Mapping[str, str]

    def is_same(self, size: int | None, version: Mapping[str, str]) -> bool:
        """Whether a size and a version are those of this file. What only one of them says is not compared: a listing
        can say other things than a look at one file."""
        both = self.version.keys() & version.keys()
        return self.size in (size, None) and all(self.version[key] == version[key] for key in both)


class Store(Protocol):
    """`url`: what was asked for, without passwords. All methods raise OSError, or an error of the driver."""

    url: str

    def files(self) -> list[StoredFile]:
        """The files, sorted by name. Raises UserError if there are none."""

    def described(self, file: StoredFile) -> StoredFile:
        """The file as it is now."""

    def read(self, file: StoredFile, start: int) -> Generator[bytes, None, None]:
        """The bytes from `start` on. Raises RangeRefused before the first one if only the whole file can be read."""


def store_of(url: str) -> Store:
    """Raises UserError if the protocol of the URL has no driver."""
    return HttpFile(url) if url.startswith(("http://", "https://")) else FsspecFiles(url)


class FsspecFiles:
    """A file, a folder with its sub-folders, or a glob of any file system of fsspec."""

    def __init__(self, url: str) -> None:
        self.url = without_secrets(url)
        self._system, self._path = file_system_of(url, "URL")

    @property
    def local_root(self) -> Path | None:
        """The folder or file, if it is on this machine."""
        protocol = self._system.protocol
        local = "file" in (protocol if isinstance(protocol, tuple | list) else (protocol,))
        return Path(self._path) if local else None

    def files(self) -> list[StoredFile]:
        self._system.invalidate_cache()
        found, root = self._listed()
        kinds = {address: info["type"] for address, info in found.items() if info["type"] not in ("file", "directory")}
        if kinds:
            what, fix = "is not a regular file", "move it away, or name the files by a glob"
            raise UserError(*(Problem(shortened(address, 400), what, fix=fix) for address in sorted(kinds)[:10]))
        files = [
            _described(address.removeprefix(root).lstrip("/"), address, info)
            for address, info in found.items()
            if info["type"] == "file" and not address.endswith("/")  # in object stores, a folder can be an object
        ]
        if not files:
            raise UserError(Problem("URL", "there is no such file or folder, or it has no files", self.url))
        return sorted(files, key=lambda file: file.name)

    def _listed(self) -> tuple[dict[str, Any], str]:
        """What fsspec says of each file, by its path; and the folder that names are relative to."""
        system, path = self._system, self._path.rstrip("/")
        if system.isfile(path):
            return {path: system.info(path)}, path.rpartition("/")[0]
        if system.isdir(path or "/"):
            return system.find(path or "/", detail=True), path
        if (sign := re.search(f"[{re.escape(SIGNS)}]", path)) is None:
            return {}, path
        return system.glob(path, detail=True), path[: sign.start()].rpartition("/")[0]

    def described(self, file: StoredFile) -> StoredFile:
        self._system.invalidate_cache()
        return _described(file.name, file.address, self._system.info(file.address))

    def read(self, file: StoredFile, start: int) -> Generator[bytes, None, None]:
        # Without a cache each read is one request for exactly its bytes.
        with self._system.open(file.address, "rb", block_size=READ_BYTES, cache_type="none") as source:
            if start:
                try:
                    source.seek(start)
                except (ValueError, NotImplementedError) as error:
                    raise RangeRefused(str(error)) from error
            while block := source.read(READ_BYTES):
                yield block


def _described(name: str, address: str, info: Mapping[str, Any]) -> StoredFile:
    content, times = ({key: _text(info[key]) for key in keys if info.get(key)} for keys in (CONTENT_KEYS, TIME_KEYS))
    said = content or dict(list(times.items())[:1])
    return StoredFile(name, address, None if info.get("size") is None else int(info["size"]), said)


def _text(value: Any) -> str:
    """Times as seconds, because fsspec gives one time as a number and as a date."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.6f}" if isinstance(seconds, float) else str(seconds)


class HttpFile:
    """One file of a web server."""

    def __init__(self, url: str) -> None:
        self.url, self._address = without_secrets(url), url
        self._name = unquote(urlsplit(url).path.rpartition("/")[2])
        if not self._name:
            fix = "name each file by its URL; folders and globs need an object store (s3://, gs://, ...)"
            raise UserError(Problem("URL", "does not name a file", self.url, fix=fix))

    def files(self) -> list[StoredFile]:
        return [self.described(StoredFile(self._name, self._address, None, {}))]

    def described(self, file: StoredFile) -> StoredFile:
        # Not HEAD: a signed URL is often valid for GET only.
        with _request(file.address, {"Range": "bytes=0-0"}) as answer:
            if answer.status == http.client.PARTIAL_CONTENT:
                size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            else:
                size = answer.headers.get("Content-Length", "0" if answer.status == 416 else "")
            version = {key: answer.headers[key] for key in ("ETag", "Last-Modified") if answer.headers.get(key)}
        return StoredFile(file.name, file.address, int(size) if size.isdecimal() else None, version)

    def read(self, file: StoredFile, start: int) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with _request(file.address, headers) as answer:
            if start:
                begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
                partial = answer.status == http.client.PARTIAL_CONTENT
                if not (partial and begins and int(begins[1]) == start):
                    raise RangeRefused
            while block := answer.read(READ_BYTES):
                yield block


def _request(url: str, headers: Mapping[str, str]) -> Any:
    """An answer, also of status 416 (the range is beyond the end). Raises OSError."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error
        said = f"the server answered {error.code} {error.reason}"
        kind = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError}
        raise kind.get(error.code, OSError)(said) from error


def without_secrets(url: str) -> str:
    """A URL without user, password and query, which can be a signature."""
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
