"""Local files: which ones a path means, how they are opened, and where in them something is wrong."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from quadriga.errors import Problem, UserError

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
}
UNREADABLE = (".zst", ".bz2", ".xz", ".zip", ".lz4", ".tar")


class File(NamedTuple):
    path: Path
    name: str  # as the fingerprint knows it: the same wherever the folder lies
    size: int  # bytes on disk

    @property
    def compressed(self) -> bool:
        return self.path.suffix == ".gz"


def find_files(kind: str, pattern: str) -> tuple[File, ...]:
    """The files of a path, a folder (searched through, by suffix) or a glob, sorted by name.

    Raises UserError where nothing is found or a format cannot be read.
    """
    path = Path(pattern).expanduser()
    suffixes = SUFFIXES[kind] + (() if kind == "parquet" else tuple(suffix + ".gz" for suffix in SUFFIXES[kind]))
    if path.is_file():
        return _describe([path], path.parent)
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)]
        found = [file for file in inside if file.name.lower().endswith(suffixes)]
        if not found:
            there = ", ".join(sorted(file.name for file in inside)[:5]) or "nothing"
            what = f"the folder holds no {kind} file; there is {there}"
            raise UserError(Problem("dataset_path", what, value=pattern, allowed=", ".join("*" + s for s in suffixes)))
        return _describe(found, path)
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    if not found:
        what = "no file matches" if glob.has_magic(pattern) else "there is no such file or folder"
        fix = f"paths are relative to the folder that the run is started from, here {Path.cwd()}"
        raise UserError(Problem("dataset_path", what, value=pattern, fix=fix))
    return _describe(found, Path(os.path.commonpath([file.parent for file in found])))


def c4_files(folder: str, split: str) -> tuple[File, ...]:
    """C4's own shards of `split` in a folder or its `en` sub-folder; else every .json.gz of no known split."""
    path = Path(folder).expanduser()
    if path.is_dir() and not list(path.glob("*.json.gz")) and (path / "en").is_dir():
        path = path / "en"
    if not path.is_dir():
        return find_files("jsonl", folder)
    here = sorted(path.glob("*.json.gz"))
    found = [file for file in here if file.name.startswith(f"c4-{split}.")]
    found = found or [file for file in here if not file.name.startswith("c4-")]
    if not found:
        what = f"the folder holds no C4 shard of the {split} split"
        fix = f"put c4-{split}.*.json.gz there, or leave dataset_path out to stream C4 from the Hub"
        raise UserError(Problem("dataset_path", what, value=folder, allowed=f"c4-{split}.*.json.gz", fix=fix))
    return _describe(found, path)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _describe(paths: Sequence[Path], root: Path) -> tuple[File, ...]:
    problems = []
    files = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        if path.name.lower().endswith(UNREADABLE):
            what = f"{path.suffix} files cannot be read"
            problems.append(Problem(str(path), what, allowed="plain files, and .gz for text and jsonl"))
        files.append(File(path, path.relative_to(root).as_posix(), path.stat().st_size))
    if not sum(file.size for file in files):
        problems.append(Problem(str(root if len(files) > 1 else paths[0]), "every file is empty"))
    if problems:
        raise UserError(*problems)
    return tuple(files)


def fingerprint(kind: str, files: Sequence[File]) -> str:
    """Of names and sizes, so that it costs no reading."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode())
    return f"{kind}:{len(files)}:{digest.hexdigest()}"


@contextmanager
def open_bytes(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed."""
    with gzip.open(file.path, "rb") if file.compressed else open(file.path, "rb") as stream:
        yield cast(BinaryIO, stream)


def lines_of(file: File) -> Iterator[tuple[int, bytes]]:
    """Every line with its offset. Raises UserError where a compressed file is broken."""
    offset = line = 0
    with open_bytes(file) as stream:
        try:
            for line, text in enumerate(stream, 1):  # noqa: B007 (an error says how far it got)
                yield offset, text
                offset += len(text)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(broken_gzip(file, line, error)) from error


def broken_gzip(file: File, lines: int, error: Exception) -> Problem:
    truncated = isinstance(error, EOFError)
    what = "the compressed file is cut off" if truncated else f"the compressed file is damaged ({error})"
    return Problem(f"{file.path}, after line {lines}", what, fix="fetch or write the file again")


def line_at(file: File, offset: int) -> int:
    """The number of the line (from 1) that holds the byte at `offset` of the decompressed file."""
    lines = 1
    with open_bytes(file) as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 16))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def decode(file: File, offset: int, data: bytes) -> str:
    """UTF-8 text that lies at `offset` of the file. Raises UserError naming the line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{file.path}, line {line_at(file, offset + error.start)}"
        what = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        fix = "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        raise UserError(Problem(where, what, fix=fix)) from error


def cut_points(size: int, *, lanes: int, least: int, most: int) -> range:
    """Where a file of `size` bytes is cut, nominally: at least four shards for each lane, if they stay above `least`.

    At most about 2^17 shards, since each epoch sorts them.
    """
    return range(0, size, min(max(size // (4 * lanes), least), max(most, size >> 17)))
