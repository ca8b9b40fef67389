"""Streams: stream i gives the windows of row i of the global batch, on whichever rank that row is.

In each epoch the shards of a source are assigned to streams in an order that depends only on (seed, epoch), so each
document goes to exactly one stream per epoch. If there are fewer shards than streams, each shard is assigned in parts
of every n-th document. Nothing here depends on ranks, threads or prefetching.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.packing import START, Cursor, SkippedRecord, Window, tokenized, windows
from quadriga.data.sources import BadRecord, Document, Record, Source
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError

BLOCK_RECORDS = 1024  # records of a shard that are shuffled together
BLOCK_CHARACTERS = 1 << 21  # a block ends earlier at so many characters
EMPTY_EPOCHS = 1000


@dataclass(frozen=True)
class Streams:
    """All streams of a source. `seed`: of the shuffling; None keeps the source's order. `endless`: continues with the
    next epoch. `skip_bad`: skips unreadable records; they keep their numbers, so that cursors do not depend on it.
    `overlap` (0 or 1): the number of ids that a window shares with the next one."""

    source: Source
    tokenizer: Tokenizer
    seq_len: int
    count: int
    seed: int | None
    endless: bool = True
    skip_bad: bool = False
    overlap: int = 1

    def windows(self, stream: int, cursor: Cursor = START) -> Iterator[Window]:
        """Yields the windows of a stream from `cursor` on."""
        skipped: deque[SkippedRecord] = deque()  # read ahead of the windows
        documents = tokenized(self.documents(stream, cursor, skipped), self.tokenizer, self.seq_len)
        for window in windows(documents, self.seq_len, cursor, self.overlap):
            passed = []
            while skipped and skipped[0].nth <= window.cursor.skipped:
                passed.append(skipped.popleft())
            yield window._replace(skipped=tuple(passed)) if passed else window

    def documents(
        self, stream: int, cursor: Cursor = START, skipped: deque[SkippedRecord] | None = None
    ) -> Iterator[tuple[Document, Cursor]]:
        """Yields the documents of a stream from the one at `cursor` on, each with its own cursor.

        With `skip_bad`, unreadable records are added to `skipped`; otherwise BadRecord is raised. Raises UserError if
        the data have no document, or after `limits.BAD_RECORDS_IN_A_ROW` unreadable records in a row.
        """
        epoch, unit, skip, start = cursor.epoch, cursor.unit, cursor.document, cursor
        count, in_a_row = cursor.skipped, 0
        empty = 0
        while empty <= EMPTY_EPOCHS + self.count:
            empty += 1
            units = self._units(stream, epoch)
            while unit < len(units):
                for number, record, block in self._records(units[unit], epoch, start):
                    if number < skip:
                        continue
                    try:
                        document = self.source.parse(record)
                    except BadRecord as error:
                        if not self.skip_bad:
                            raise
                        count, in_a_row = count + 1, in_a_row + 1
                        if skipped is not None:
                            skipped.append(SkippedRecord(count, record.shard, record.number, error.what))
                        if in_a_row > limits.BAD_RECORDS_IN_A_ROW:
                            raise self._no_data(in_a_row, record, error) from error
                        continue
                    empty = in_a_row = 0
                    yield (
                        document._replace(id=(epoch, record.shard, record.number)),
                        Cursor(epoch, unit, number, 0, count, *block),
                    )
                unit, skip, start = unit + 1, 0, START
            if not self.endless:
                return
            epoch, unit, skip, start = epoch + 1, 0, 0, START
        raise UserError(Problem("dataset", "the data have no document", value=self.source.fingerprint))

    def _no_data(self, count: int, record: Record, error: BadRecord) -> UserError:
        where = self.source.format_location(record.shard, record.number)
        what = f"{count:,} records in a row cannot be read; the last of them: {error.what}"
        return UserError(Problem(where, what, fix="repair the data, or set the right data set, format and field"))

    @property
    def _parts(self) -> int:
        """The number of parts of each shard: the smallest number that gives every stream a part."""
        return -(-self.count // self.source.shards)

    def _units(self, stream: int, epoch: int) -> npt.NDArray[np.int64]:
        """The (shard, part) pairs of a stream, each as one number. The assignment rotates with the epoch, so that no
        stream always has fewer units."""
        count = self.source.shards * self._parts
        order = _cached_order(count, f"{self.seed} {epoch} shards") if self.seed is not None else np.arange(count)
        return order[(stream + epoch) % self.count :: self.count]

    def _records(
        self, unit: int, epoch: int, start: Cursor = START
    ) -> Iterator[tuple[int, Record, tuple[int, int, int]]]:
        """Yields the records of one part of one shard, shuffled block by block, from the block of `start` on.

        Each item is the number in the part, the record, and the block: (index, records before it, records in it)."""
        shard, part = divmod(int(unit), self._parts)
        parts = self._parts
        blocks = _blocks(self.source.read(shard), start.block, start.first, start.records)
        for records, block in blocks:
            _, first, count = block
            for position, index in enumerate(self._order(count, f"shard {shard} block {block[0]}", epoch), first):
                # A file that was changed may have fewer records than its last block had.
                if position % parts == part and index < len(records):
                    yield position // parts, records[index], block

    def shard(self, stream: int, cursor: Cursor) -> tuple[int, int]:
        """The shard at the cursor of a stream, and the number of its documents up to the cursor, including that one."""
        units = self._units(stream, cursor.epoch)
        shard, part = divmod(int(units[cursor.unit]), self._parts)
        return shard, cursor.document * self._parts + part + 1

    def _order(self, count: int, what: str, epoch: int) -> npt.NDArray[np.int64]:
        return shuffled(count, f"{self.seed} {epoch} {what}") if self.seed is not None else np.arange(count)


def _blocks(
    records: Iterator[Record], number: int, first: int, count: int
) -> Iterator[tuple[list[Record], tuple[int, int, int]]]:
    """Yields the blocks from block `number` on, which has `count` records and `first` records before it. With `count`
    0, yields all blocks."""
    if count:
        block = list(islice(records, first, first + count))
        yield block, (number, first, count)
        number, first, block = number + 1, first + count, []
    else:
        number, first, block = 0, 0, []
    characters = 0
    for record in records:
        block.append(record)
        characters += len(record.data or "")
        if len(block) == BLOCK_RECORDS or characters >= BLOCK_CHARACTERS:
            yield block, (number, first, len(block))
            number, first, block, characters = number + 1, first + len(block), [], 0
    if block:
        yield block, (number, first, len(block))


@functools.lru_cache(maxsize=4)
def _cached_order(count: int, key: str) -> npt.NDArray[np.int64]:
    """`shuffled`, cached because all streams need the same order."""
    order = shuffled(count, key)
    order.flags.writeable = False
    return order


def shuffled(count: int, key: str) -> npt.NDArray[np.int64]:
    """A permutation of range(count), int64, that depends only on `key`, not on versions of libraries.

    Sorts the indices by splitmix64 (Steele, Lea, Flood 2014) of the index, offset by a hash of the key. NumPy's
    generators are not used, because their streams may change between releases.
    """
    start = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8).digest(), "<u8")
    mixed = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
