"""Puts pieces together to shards, in order. The bytes of the shards do not depend on when pieces were made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quadriga.data.pieces import BEGINS, NOTHING, Piece, sync
from quadriga.data.shards import MANIFEST, MadeBy, Shard, ShardManifest, shard_name
from quadriga.data.tokenize_job import STATE, piece_path, sync_folder, write_json
from quadriga.data.unfinished import WORK
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import read_json_object

IDS_AT_ONCE = 1 << 22


class HashedFile:
    """A file that is written once, and its hash. `position`: in numbers of `dtype`."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.position = path, np.dtype(dtype).newbyteorder("<"), 0
        self._digest, self._file = hashlib.sha256(), path.open("wb")

    def write(self, numbers: npt.NDArray[Any]) -> None:
        data = numbers.astype(self.dtype, copy=False).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.position += len(numbers)

    def finish(self, path: Path) -> str:
        """Renames the file, which is on the disk then, to `path`. Returns its SHA-256."""
        sync(self._file)
        self._file.close()
        self.path.replace(path)
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Finished:
    """What the finished shards have: the content of `state.json`.

    The next shard begins in piece number `piece`, at its id number `ids` and at document end number `ends`. `bad`: bad
    records of the pieces before. `lengths`: number of documents by length, as in `ShardManifest`.
    """

    piece: int = 0
    ids: int = 0
    ends: int = 0
    bad: int = 0
    shards: tuple[Shard, ...] = ()
    lengths: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, work: Path) -> Finished:
        """The state of a job that is continued. Raises UserError if the file is damaged."""
        path = work / STATE
        if not path.exists():
            return cls()
        content = read_json_object(path, what="state of the job")
        try:
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            lengths = {int(length): int(count) for length, count in content.pop("lengths").items()}
            return cls(**{name: int(count) for name, count in content.items()}, shards=shards, lengths=lengths)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = "the state of the job is damaged"
            raise UserError(Problem(shortened(path, 400), what, fix="remove the folder, and start again")) from error


class Assembler:
    """Writes the shards of a folder from pieces, which `add` gets in order.

    A shard ends with the document with which it has `shard_tokens` ids, so it can have more.
    """

    def __init__(self, out: Path, dtype: str, shard_tokens: int) -> None:
        """Continues after the finished shards. Raises UserError: their state is damaged; OSError."""
        self.dtype, self._out, self._work, self._most = dtype, out, out / WORK, shard_tokens
        self.finished = Finished.read(self._work)
        self.piece = self.finished.piece  # the next that `add` takes
        self._skip = (self.finished.ids, self.finished.ends)  # of that piece, in the finished shards
        self._bad, self._lengths = self.finished.bad, dict(self.finished.lengths)
        self._last_end, self._unfinished = 0, False  # of the open shard
        self._bins, self._ends = self._open()

    def _open(self) -> tuple[HashedFile, HashedFile]:
        return HashedFile(self._work / "bin.part", self.dtype), HashedFile(self._work / "idx.part", "int64")

    def close(self) -> None:
        self._bins.close()
        self._ends.close()

    def add(self, piece: Piece) -> None:
        """Takes the next piece. Raises OSError."""
        header, ends = piece.header, piece.ends()
        (at, document), self._skip = self._skip, (0, 0)
        if header.first == BEGINS and not at and not document and self._unfinished:
            self._end(np.array([self._bins.position], np.int64))
            self._finish_if_full(0, 0)
        while document < len(ends):
            base = self._bins.position - at
            last = int(np.searchsorted(ends[document:], self._most - base)) + document  # with which the shard is full
            taken = ends[document : last + 1]
            self._copy(piece, at, int(taken[-1]))
            self._end(taken + base)
            at, document = int(taken[-1]), document + len(taken)
            self._finish_if_full(at, document)
        self._copy(piece, at, header.ids)
        if header.first != NOTHING:
            self._unfinished = header.unfinished
        self._bad += header.bad
        self.piece += 1

    def _copy(self, piece: Piece, start: int, stop: int) -> None:
        for first in range(start, stop, IDS_AT_ONCE):
            self._bins.write(piece.ids(first, min(first + IDS_AT_ONCE, stop)))

    def _end(self, ends: npt.NDArray[np.int64]) -> None:
        """Adds documents that end at these positions of the open shard."""
        self._ends.write(ends)
        lengths = np.diff(ends, prepend=self._last_end)
        least = np.where(lengths > 0, 1 << np.log2(np.maximum(lengths, 1)).astype(np.int64), 0)
        for length, count in zip(*np.unique(least, return_counts=True), strict=True):
            self._lengths[int(length)] = self._lengths.get(int(length), 0) + int(count)
        self._last_end, self._unfinished = int(ends[-1]), False

    def _finish_if_full(self, ids: int, ends: int) -> None:
        """Finishes the shard if it is full. `ids`, `ends`: how much of the current piece is in it."""
        if self._bins.position >= self._most:
            self._finish(ids, ends)

    def _finish(self, ids: int, ends: int) -> None:
        name = shard_name(len(self.finished.shards))
        counts, files = (self._bins.position, self._ends.position), {"bin": self._bins, "idx": self._ends}
        hashes = [file.finish(self._out / f"{name}.{suffix}") for suffix, file in files.items()]
        sync_folder(self._out)
        shards = (*self.finished.shards, Shard(name, *counts, *hashes))
        before = self.finished.piece
        self.finished = Finished(self.piece, ids, ends, self._bad, shards, self._lengths)
        write_json(self._work / STATE, asdict(self.finished))
        for number in range(before, self.piece):
            piece_path(self._work, number).unlink(missing_ok=True)
        self._last_end = 0
        self._bins, self._ends = self._open()

    def complete(self, maker: MadeBy, source: Mapping[str, str]) -> ShardManifest:
        """After the last piece: finishes the last shard, and writes the manifest. Raises UserError: no id; OSError."""
        if self._unfinished:
            self._end(np.array([self._bins.position], np.int64))
        if self._bins.position or self._ends.position:
            self._finish(0, 0)
        if not any(shard.ids for shard in self.finished.shards):
            raise UserError(Problem("SOURCE", "the data have no document", fix="name other data"))
        state = self.finished
        manifest = ShardManifest(self.dtype, state.shards, maker, dict(state.lengths), source, self._bad)
        write_json(self._out / MANIFEST, manifest.as_json())
        return manifest
