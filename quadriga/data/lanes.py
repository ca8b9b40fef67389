"""Lanes: row i of the global batch is fed by lane i, whoever holds that row.

The shards of a source are dealt to lanes anew in each epoch, in an order that depends on (seed, epoch) alone, so that
each document goes to exactly one lane an epoch. Where shards are fewer than lanes, a shard is dealt in parts, each of
every n-th document. Nothing here knows of ranks, threads or how far anyone has read ahead.
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
from quadriga.data.packing import START, LeftOut, Place, Window, tokenized, windows
from quadriga.data.sources import BadRecord, Document, Record, Source
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError

BLOCK_RECORDS = 1024  # records of a shard that are shuffled together ...
BLOCK_CHARACTERS = 1 << 21  # ... or fewer, if they are long
BARREN_EPOCHS = 1000


@dataclass(frozen=True)
class Lanes:
    """`seed` None leaves everything in the source's own order; `endless` goes on with the next epoch; `skip_bad` leaves
    out records that cannot be read. They keep their numbers, so that a place is the same whether they can or not.
    `overlap` (0 or 1): how many ids of a window the next one begins with."""

    source: Source
    tokenizer: Tokenizer
    seq_len: int
    count: int
    seed: int | None
    endless: bool = True
    skip_bad: bool = False
    overlap: int = 1

    def windows(self, lane: int, place: Place = START) -> Iterator[Window]:
        """The lane's windows from `place` on."""
        left_out: deque[LeftOut] = deque()  # read ahead of the windows
        documents = tokenized(self.documents(lane, place, left_out), self.tokenizer, self.seq_len)
        for window in windows(documents, self.seq_len, place, self.overlap):
            passed = []
            while left_out and left_out[0].nth <= window.place.left_out:
                passed.append(left_out.popleft())
            yield window._replace(left_out=tuple(passed)) if passed else window

    def documents(
        self, lane: int, place: Place = START, left_out: deque[LeftOut] | None = None
    ) -> Iterator[tuple[Document, Place]]:
        """The lane's documents from the one at `place` on, each with its own place.

        Records that cannot be read are added to `left_out`, where `skip_bad` says to leave them out; else BadRecord.
        """
        epoch, turn, skip, start = place.epoch, place.turn, place.document, place
        count, in_a_row = place.left_out, 0
        barren = 0
        while barren <= BARREN_EPOCHS + self.count:
            barren += 1
            units = self._units(lane, epoch)
            while turn < len(units):
                for number, record, block in self._records(units[turn], epoch, start):
                    if number < skip:
                        continue
                    try:
                        document = self.source.parse(record)
                    except BadRecord as error:
                        if not self.skip_bad:
                            raise
                        count, in_a_row = count + 1, in_a_row + 1
                        if left_out is not None:
                            left_out.append(LeftOut(count, record.shard, record.number, error.what))
                        if in_a_row > limits.BAD_RECORDS_IN_A_ROW:
                            raise self._no_data(in_a_row, record, error) from error
                        continue
                    barren = in_a_row = 0
                    yield (
                        document._replace(id=(epoch, record.shard, record.number)),
                        Place(epoch, turn, number, 0, count, *block),
                    )
                turn, skip, start = turn + 1, 0, START
            if not self.endless:
                return
            epoch, turn, skip, start = epoch + 1, 0, 0, START
        raise UserError(Problem("dataset", "the data holds no document", value=self.source.fingerprint))

    def _no_data(self, count: int, record: Record, error: BadRecord) -> UserError:
        where = self.source.place(record.shard, record.number)
        what = f"{count:,} records in a row cannot be read; the last of them: {error.what}"
        return UserError(Problem(where, what, fix="mend the data, or name the right data set, format and field"))

    @property
    def _parts(self) -> int:
        """Into how many parts each shard is dealt: as few as give every lane one."""
        return -(-self.count // self.source.shards)

    def _units(self, lane: int, epoch: int) -> npt.NDArray[np.int64]:
        """The (shard, part) pairs of a lane as one number each. The deal rotates, so that no lane stays short."""
        count = self.source.shards * self._parts
        order = _dealt(count, f"{self.seed} {epoch} shards") if self.seed is not None else np.arange(count)
        return order[(lane + epoch) % self.count :: self.count]

    def _records(
        self, unit: int, epoch: int, start: Place = START
    ) -> Iterator[tuple[int, Record, tuple[int, int, int]]]:
        """One part of one shard, shuffled block by block, from the block of `start` on: of each record its number in
        the part, and the block (which, records before it, records in it)."""
        shard, part = divmod(int(unit), self._parts)
        parts = self._parts
        blocks = _blocks(self.source.read(shard), start.block, start.first, start.records)
        for records, block in blocks:
            _, first, count = block
            for position, index in enumerate(self._order(count, f"shard {shard} block {block[0]}", epoch), first):
                # A file that was mended may have fewer records than its last block had.
                if position % parts == part and index < len(records):
                    yield position // parts, records[index], block

    def shard(self, lane: int, place: Place) -> tuple[int, int]:
        """The shard that the lane stands in, and how many of its documents were dealt up to there, with that one."""
        units = self._units(lane, place.epoch)
        shard, part = divmod(int(units[place.turn]), self._parts)
        return shard, place.document * self._parts + part + 1

    def _order(self, count: int, what: str, epoch: int) -> npt.NDArray[np.int64]:
        return shuffled(count, f"{self.seed} {epoch} {what}") if self.seed is not None else np.arange(count)


def _blocks(
    records: Iterator[Record], number: int, first: int, count: int
) -> Iterator[tuple[list[Record], tuple[int, int, int]]]:
    """The blocks from the `number`-th on, which has `count` records, with `first` before it; 0: as they come."""
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
def _dealt(count: int, key: str) -> npt.NDArray[np.int64]:
    """`shuffled`, kept for the lanes that ask for the same."""
    order = shuffled(count, key)
    order.flags.writeable = False
    return order


def shuffled(count: int, key: str) -> npt.NDArray[np.int64]:
    """A permutation of range(count) that only `key` decides, in every version of every library.

    Sorts by splitmix64 (Steele, Lea, Flood 2014) of the index, offset by a hash of the key; NumPy's own generators may
    change their streams between releases.
    """
    start = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8).digest(), "<u8")
    mixed = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
