"""The built-in corpus: source and documentation of the Python standard library, read from the Python installation.

Real text, about 10 MB, without a download. Tests, generated tables and files that depend on the machine are excluded.
Opening it lists folders and reads no file, because the first step waits for it.
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from quadriga.data.sources import Document, Record, SourceWithoutFiles
from quadriga.errors import Problem, UserError

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
LEFT_OUT |= {"encodings", "lib2to3", "pydoc_data"}  # code tables and grammars; topics are read as text instead
HELD_OUT = 20  # one of so many documents is held out for validation


class BuiltinSource(SourceWithoutFiles):
    """A shard is one document: a file of the standard library, a help topic, or the documentation of a built-in."""

    def __init__(self, *, held_out: bool) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        sizes = {name: size for name, size in _list_documents(self._root) if _is_held_out(name) == held_out}
        if not any(name.startswith("file:") for name in sizes):
            what = f"this Python came without the source of its standard library ({self._root})"
            raise UserError(Problem("dataset builtin", what, fix="use another Python, or name another dataset"))
        self.names, self._sizes = sorted(sizes), sizes
        self.shards = len(self.names)
        digest = hashlib.blake2b(digest_size=8)
        for name in self.names:
            digest.update(f"{name}\0{sizes[name]}\0".encode())
        version = sysconfig.get_python_version()
        self.fingerprint = f"builtin{'_validation' if held_out else ''}:python-{version}:{digest.hexdigest()}"

    def read(self, shard: int) -> Iterator[Record]:
        name = self.names[shard]
        kind, _, rest = name.partition(":")
        if kind == "file":
            with tokenize.open(self._root / rest) as file:  # uses the encoding that the file declares
                text = file.read()
        else:
            text = topics[rest] if kind == "topic" else _documentation(rest)
        yield Record(shard, 0, text)

    def parse(self, record: Record) -> Document:
        assert isinstance(record.data, str)
        return Document(record.data)

    def bytes_of(self, shard: int) -> int:
        return self._sizes[self.names[shard]]

    def format_location(self, shard: int, number: int) -> str:
        return self.names[shard]


def _list_documents(root: Path) -> Iterator[tuple[str, int]]:
    """(name, size) of every document; the size of a file in bytes, of documentation in characters."""
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in LEFT_OUT and not name.startswith("config-")]
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                if size := os.path.getsize(path):
                    yield "file:" + os.path.relpath(path, root).replace(os.sep, "/"), size
    for name, text in topics.items():
        yield f"topic:{name}", len(text)
    for name, thing in vars(builtins).items():
        native = isinstance(thing, type) or inspect.isbuiltin(thing)  # not what `site` or a library adds
        if native and thing.__module__ == "builtins" and not name.startswith("_"):
            yield f"builtin:{name}", len(thing.__doc__ or "")


def _documentation(name: str) -> str:
    """The documentation of a built-in and, for a type, of the methods that it defines."""
    thing = getattr(builtins, name)
    parts = [name, inspect.getdoc(thing) or ""]
    if isinstance(thing, type):
        for member, value in sorted(vars(thing).items()):
            if not member.startswith("_") and (text := inspect.getdoc(value)):
                parts.append(f"{name}.{member}\n{text}")
    return "\n\n".join(parts) + "\n"


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0
