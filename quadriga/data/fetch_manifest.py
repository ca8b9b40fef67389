"""`manifest.jsonl` of `quadriga data fetch`: a line for each copied file. The newest line of a name counts."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from quadriga import limits
from quadriga.data.pieces import sync
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import parse_json, read_lines


class Unwritable(Exception):
    """The local disk failed: `error`, of the file `path`."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(str(error))
        self.path, self.error = path, error


@dataclass(frozen=True)
class CopiedFile:
    """A file that was copied. `url`: what was fetched. `version`: of the file in the store. `modified`: of the copy, in
    nanoseconds since the epoch."""

    name: str
    url: str
    size: int
    sha256: str
    version: dict[str, str]
    modified: int


TYPES = {"name": str, "url": str, "size": int, "sha256": str, "version": dict, "modified": int}


class FetchManifest:
    """The manifest, open for adding lines from any thread. `records`: by name."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.records: dict[str, CopiedFile] = {}

    def __enter__(self) -> FetchManifest:
        """Raises OSError; UserError if a line is not one of a manifest."""
        end = 0
        if self._path.exists():
            for number, line in read_lines(self._path, longest=limits.LOG_LINE_BYTES, keep_ends=True):
                if not line.endswith(b"\n"):
                    break  # a kill can leave a part of a line
                record = _record(line, f"{shortened(self._path, 400)}, line {number}")
                self.records[record.name] = record
                end += len(line)
        self._file: BinaryIO = self._path.open("ab")
        self._file.truncate(end)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, copied: CopiedFile) -> None:
        """Raises Unwritable."""
        with self._lock:
            try:
                self._file.write(json.dumps(asdict(copied)).encode() + b"\n")
                sync(self._file)
            except OSError as error:
                raise Unwritable(self._path, error) from error
            self.records[copied.name] = copied


def _record(line: bytes, where: str) -> CopiedFile:
    content = parse_json(line, where)
    names = [field.name for field in fields(CopiedFile)]
    if not isinstance(content, dict) or any(type(content.get(name)) is not TYPES[name] for name in names):
        fix = "remove the folder, and fetch the files again"
        raise UserError(Problem(where, "is not a line of a manifest of `quadriga data fetch`", fix=fix))
    return CopiedFile(**{name: content[name] for name in names})
