"""Pieces of a tokenization: the ids of consecutive shards of a source, in one file that is complete or absent.

How a source is cut into pieces depends on the source alone. A file has a header, the ids, and the ends of documents.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.sources import BadRecord, Document, Source
from quadriga.data.streams import encode_documents
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError
from quadriga.units import grouped

PIECE_BYTES = 1 << 22  # of the source: about a second of work
LEAST_PIECE_BYTES = 1 << 16
LEAST_PIECES = 64  # of a smaller source, if it can be cut into so many, so that all processes end at about one time
GROUP_CHARACTERS = 1 << 18  # tokenized in one call
DOCUMENT_OVERHEAD = 64  # characters that are counted per document in addition
MOST_LISTED = 10  # bad records whose locations are reported, of one piece
HEADER = struct.Struct("<8sQQQBB6x")
MAGIC = b"QTPIECE1"
NOTHING, BEGINS, CONTINUES = range(3)  # what the first record of a piece does


@dataclass(frozen=True)
class PieceHeader:
    """ids, ends: how many of each. bad: records that were skipped. first: NOTHING if the piece has no document, else
    whether the first one begins here or in an earlier piece. unfinished: the last one has not ended."""

    ids: int
    ends: int
    bad: int
    first: int
    unfinished: bool

    def size(self, dtype: str) -> int:
        return HEADER.size + self.ids * np.dtype(dtype).itemsize + self.ends * 8


@dataclass
class _Progress:
    """Of the piece that is written. `ends`: positions at which a document ends."""

    ids: int = 0
    ends: array[int] = field(default_factory=lambda: array("q"))
    first: int = NOTHING
    unfinished: bool = False
    bad: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, document: Document, ids: int) -> None:
        if self.first == NOTHING:
            self.first = BEGINS if document.begins else CONTINUES
        if document.begins and self.unfinished:  # the end of the document before was a bad record
            self.ends.append(self.ids)
        self.ids += ids
        self.unfinished = not document.ends
        if document.ends:
            self.ends.append(self.ids)


def cut_pieces(source: Source) -> list[range]:
    """The shards of each piece: as many as have PIECE_BYTES, at least one. Of a small source as many as have
    1 / LEAST_PIECES of its bytes."""
    share = sum(map(source.bytes_of, range(source.shards))) // LEAST_PIECES
    groups = grouped(range(source.shards), source.bytes_of, min(max(share, LEAST_PIECE_BYTES), PIECE_BYTES))
    return [range(group[0], group[-1] + 1) for group in groups]


def cut_digest(source: Source, pieces: Sequence[range]) -> str:
    """Identifies how a source is cut: pieces of different cuts must not be put together."""
    cut = repr((source.layout(), [(piece.start, piece.stop) for piece in pieces]))
    return hashlib.blake2b(cut.encode(), digest_size=8).hexdigest()


def write_piece(
    path: Path,
    source: Source,
    shards: Sequence[int],
    tokenizer: Tokenizer,
    dtype: str,
    *,
    skip_bad: bool,
    report: Callable[[int], None],
) -> tuple[PieceHeader, list[str]]:
    """Tokenizes the shards into a file, and renames it to `path` when it is complete. `report` gets the number of ids
    after each group of documents.

    Returns the header, and where and why the first bad records were skipped.
    Raises UserError: a record is bad (unless `skip_bad`) or cannot be read; OSError: the file cannot be written.
    """
    found, temporary = _Progress(), path.with_suffix(f".{os.getpid()}.part")
    documents = _documents(source, shards, skip_bad, found)
    try:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER.size))
            for group in grouped(documents, lambda each: len(each.text) + DOCUMENT_OVERHEAD, GROUP_CHARACTERS):
                encoded = [ids for ids, _ in encode_documents(group, tokenizer)]
                ids = np.concatenate(encoded)
                _require_in_vocabulary(ids, tokenizer)
                file.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                for document, its_ids in zip(group, encoded, strict=True):
                    found.add(document, len(its_ids))
                report(found.ids)
            file.write(np.frombuffer(found.ends, np.int64).astype("<i8").tobytes() if found.ends else b"")
            header = PieceHeader(found.ids, len(found.ends), found.bad, found.first, found.unfinished)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, *vars(header).values()))
            sync(file)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # on a full disk, its space may be what is missing
        raise
    return header, found.listed


def _documents(source: Source, shards: Sequence[int], skip_bad: bool, found: _Progress) -> Iterator[Document]:
    in_a_row = 0
    for shard in shards:
        for record in source.read(shard):
            try:
                yield source.parse(record)
                in_a_row = 0
            except BadRecord as error:
                if not skip_bad:
                    raise
                found.bad, in_a_row = found.bad + 1, in_a_row + 1
                if len(found.listed) < MOST_LISTED:
                    found.listed.append(f"{source.format_location(record.shard, record.number)}: {error.what}")
                if in_a_row > limits.BAD_RECORDS_IN_A_ROW:
                    what = f"{in_a_row:,} records in a row cannot be read; the last of them: {error.what}"
                    fix = "repair the data, or set the right data set, format and field"
                    where = source.format_location(record.shard, record.number)
                    raise UserError(Problem(where, what, fix=fix)) from error


def _require_in_vocabulary(ids: npt.NDArray[np.int32], tokenizer: Tokenizer) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0])
        what = f"gives the id {wrong}, which is not in its vocabulary of {tokenizer.vocab_size:,}"
        raise UserError(Problem("model.hf_assets_path", what, fix="repair the tokenizer, or use another one"))


def sync(file: BinaryIO) -> None:
    """Makes sure that the bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


class Piece:
    """A complete piece, for reading."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Raises ValueError if the file is not a complete piece; OSError if it cannot be read."""
        self._path, self._dtype = path, np.dtype(dtype).newbyteorder("<")
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError("not a piece")
        _, ids, ends, bad, first, unfinished = HEADER.unpack(head)
        self.header = PieceHeader(ids, ends, bad, first, bool(unfinished))
        if path.stat().st_size != self.header.size(dtype):
            raise ValueError("not complete")

    def ids(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Ids [start, stop) as they are stored."""
        offset = HEADER.size + start * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, stop - start, offset=offset)

    def ends(self) -> npt.NDArray[np.int64]:
        offset = HEADER.size + self.header.ids * self._dtype.itemsize
        return np.fromfile(self._path, "<i8", self.header.ends, offset=offset).astype(np.int64)
