"""Shards of token ids, as `quadriga tokenize` writes them.

A folder has `manifest.json`, and for each shard two files: `NNNNN.bin` with the ids, little-endian and without a
header, and `NNNNN.idx` with the position after the last id of each document, little-endian int64. A document is in one
shard as a whole. The manifest has the dtype, the sizes and hashes of all files, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.data.files import File
from quadriga.data.stored_arrays import OpenFiles, StoredArray, path_of
from quadriga.data.token_formats import (
    BLOCK,
    INT64,
    Documents,
    PlainFile,
    TokenOptions,
    join_documents,
    require_dtype,
)
from quadriga.data.unfinished import refuse_unfinished
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import read_json_object

FORMAT, VERSION = "quadriga-tokens", 1
MANIFEST = "manifest.json"
WIDE_VOCABULARY = 1 << 16  # ids from here on need uint32
DTYPES = ("uint16", "uint32")
HASHED_AT_ONCE = 1 << 22  # bytes
AGAIN = "write the shards again, or copy the folder again"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class MadeBy:
    """The tokenizer that made the ids. `fingerprint`: `Tokenizer.fingerprint`."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None


@dataclass(frozen=True)
class Shard:
    """One shard: its ids and documents, and the hashes of its two files (SHA-256, hexadecimal)."""

    name: str
    ids: int
    documents: int
    bin_sha256: str
    idx_sha256: str

    def bin_bytes(self, dtype: str) -> int:
        return self.ids * np.dtype(dtype).itemsize

    @property
    def idx_bytes(self) -> int:
        return self.documents * INT64.itemsize


@dataclass(frozen=True)
class ShardManifest:
    """The content of `manifest.json`.

    lengths: the number of documents by length, BOS and EOS included. The key k counts lengths from k to 2 k - 1, and 0
    those without an id. source: `fingerprint`, `dataset` and `field` of the data. bad_records: those that were skipped.
    """

    dtype: str
    shards: tuple[Shard, ...]
    tokenizer: MadeBy
    lengths: Mapping[int, int]
    source: Mapping[str, str]
    bad_records: int = 0

    @property
    def ids(self) -> int:
        return sum(shard.ids for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "ids": self.ids,
            "documents": self.documents,
            "bad_records": self.bad_records,
            "tokenizer": vars(self.tokenizer),
            "source": dict(self.source),
            "document_lengths": {str(length): count for length, count in sorted(self.lengths.items())},
            "shards": [
                vars(shard) | {"bin_bytes": shard.bin_bytes(self.dtype), "idx_bytes": shard.idx_bytes}
                for shard in self.shards
            ],
        }


def dtype_for(vocab_size: int) -> str:
    """The dtype of the ids of a vocabulary."""
    return "uint16" if vocab_size <= WIDE_VOCABULARY else "uint32"


def shard_name(index: int) -> str:
    return f"{index:05d}"


def read_manifest(folder: Path) -> ShardManifest | None:
    """The manifest of a folder of shards; None if the folder has none, or one of another program.

    Raises UserError: the folder is of a job that is not finished, or the manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        refuse_unfinished(folder)
        return None
    content = read_json_object(path, what="manifest")
    return _parse(content, shortened(path, 400)) if content.get("format") == FORMAT else None


def _parse(content: Mapping[str, Any], where: str) -> ShardManifest:
    if content.get("version") != VERSION:
        what = f"the manifest is of version {shortened(content.get('version'))}, written by another Quadriga"
        raise UserError(Problem(where, what, allowed=f"version {VERSION}", fix="use the Quadriga that wrote it"))
    try:
        manifest = ShardManifest(
            dtype=_one_of(content["dtype"], DTYPES),
            shards=tuple(_shard(index, entry) for index, entry in enumerate(content["shards"])),
            tokenizer=_made_by(content["tokenizer"]),
            lengths={int(length): _count(number) for length, number in content["document_lengths"].items()},
            source={str(name): _text(text) for name, text in content["source"].items()},
            bad_records=_count(content["bad_records"]),
        )
        if manifest.as_json() != content or sum(manifest.lengths.values()) != manifest.documents:
            raise ValueError("its numbers do not agree")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = shortened(error, 200)
        raise UserError(Problem(where, f"the manifest is damaged: {reason}", fix=AGAIN)) from error
    return manifest


def _shard(index: int, entry: Mapping[str, Any]) -> Shard:
    hashes = entry["bin_sha256"], entry["idx_sha256"]
    if not all(isinstance(each, str) and SHA256.fullmatch(each) for each in hashes):
        raise ValueError(f"the hashes of shard {index} are not SHA-256")
    return Shard(
        _one_of(entry["name"], (shard_name(index),)), _count(entry["ids"]), _count(entry["documents"]), *hashes
    )


def _made_by(entry: Mapping[str, Any]) -> MadeBy:
    marks = (None if entry[name] is None else _count(entry[name]) for name in ("bos_id", "eos_id"))
    return MadeBy(_text(entry["fingerprint"]), _count(entry["vocab_size"]), *marks)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{shortened(value)} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shortened(value)} is not a text")
    return value


def _one_of(value: Any, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{shortened(value)} is not {' or '.join(allowed)}")
    return str(value)


def manifests_of(files: Iterable[File], whole: bool) -> dict[Path, ShardManifest]:
    """The manifests of the folders of some files, by folder. `whole`: the files are all files of their folders.

    Raises UserError as `read_manifest`, or if a file is not in the manifest of its folder, or a shard is missing.
    """
    there: dict[Path, set[str]] = {}
    for file in files:
        there.setdefault(file.path.parent, set()).add(file.path.name)
    found = {folder: manifest for folder in there if (manifest := read_manifest(folder)) is not None}
    for folder, manifest in found.items():
        named = {f"{shard.name}.bin" for shard in manifest.shards}
        if extra := sorted(there[folder] - named):
            what = "is not in the manifest of its folder"
            raise UserError(Problem(shortened(folder / extra[0], 400), what, fix="move it out of the folder"))
        if whole and (missing := sorted(named - there[folder])):
            what = f"the shard is missing; {MANIFEST} lists it"
            raise UserError(Problem(shortened(folder / missing[0], 400), what, fix=AGAIN))
    return found


class ShardFile(PlainFile):
    """A shard. `_ends`: by document, the position after its last id."""

    indexed = True

    def __init__(self, ids: StoredArray, ends: StoredArray, shard: Shard, made_by: MadeBy) -> None:
        super().__init__(ids)
        self._ends, self._shard, self.made_by = ends, shard, made_by
        self.index, self.digest = ends.file, f"{shard.bin_sha256} {shard.idx_sha256}"

    def documents(self, start: int, stop: int) -> Documents:
        begin = self._ends.search(start)
        end = self._ends.search(stop - 1, near=begin) + 1
        try:
            if end > self._ends.count:
                raise ValueError(f"no document has id {stop - 1:,}")
            return join_documents(
                begin, end, start, stop, lambda first, after: self._ends.read(first, after).astype(np.int64)
            )
        except ValueError as error:
            raise UserError(self._damaged(str(error))) from error

    def index_problems(self) -> Iterator[Problem]:
        before = 0
        for start in range(0, self._ends.count, BLOCK):
            ends = self._ends.read(start, min(start + BLOCK, self._ends.count))
            if len(wrong := np.flatnonzero(np.diff(ends, prepend=before) < 0)):
                yield self._damaged(f"document {start + int(wrong[0]):,} ends before the one before it")
                break
            before = int(ends[-1])
        else:
            if before != self.length:
                yield self._damaged(f"its last document ends at {before:,} of {self.length:,} ids")
        for array, expected in ((self._ids, self._shard.bin_sha256), (self._ends, self._shard.idx_sha256)):
            if _sha256(array) != expected:
                yield Problem(path_of(array.file), f"its bytes are not those that {MANIFEST} states", fix=AGAIN)

    def _damaged(self, what: str) -> Problem:
        return Problem(path_of(self._ends.file), f"the index is damaged: {what}", fix=AGAIN)


def open_shard(
    files: OpenFiles, file: File, index: File | None, manifest: ShardManifest, options: TokenOptions
) -> ShardFile:
    """A shard that `manifest` lists. Sizes are compared. Raises UserError."""
    shard = manifest.shards[int(file.path.stem)]
    if index is None:
        raise UserError(Problem(path_of(file), f"its index {shard.name}.idx is missing", fix=AGAIN))
    for there, size in ((file, shard.bin_bytes(manifest.dtype)), (index, shard.idx_bytes)):
        if there.size != size:
            what = f"the file has {there.size:,} bytes; {MANIFEST} states {size:,}"
            raise UserError(Problem(path_of(there), what, fix=AGAIN))
    dtype = require_dtype(file, np.dtype(manifest.dtype).newbyteorder("<"), options)
    ends = StoredArray(files, index, INT64, 0, shard.documents)
    return ShardFile(StoredArray(files, file, dtype, 0, shard.ids), ends, shard, manifest.tokenizer)


def _sha256(array: StoredArray) -> str:
    digest, size = hashlib.sha256(), array.file.size
    for start in range(0, size, HASHED_AT_ONCE):
        digest.update(array.files.read(array.file, start, min(HASHED_AT_ONCE, size - start)))
    return digest.hexdigest()
