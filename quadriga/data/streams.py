"""Streams: stream i gives the windows of row i of the global batch, on whichever rank that row is.

In each epoch the shards of a source are assigned to streams in an order that depends only on (seed, epoch), so each
document goes to exactly one stream per epoch. If there are fewer shards than streams, each shard is assigned in parts
of every n-th document. The documents of a stream are tokenized and packed into fixed windows; every window has the
cursor at which reading continues. Nothing of this depends on ranks, threads or prefetching: `Prefetcher` only runs
streams ahead of their reader.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data import stalls
from quadriga.data.sources import BadRecord, Document, DocumentId, DocumentName, Record, Source
from quadriga.data.tokenizer import Ids, Tokenizer
from quadriga.errors import Problem, UserError, shortened

BLOCK_RECORDS = 1024  # records of a shard that are shuffled together
BLOCK_CHARACTERS = 1 << 21  # a block ends earlier at so many characters
EMPTY_EPOCHS = 1000
BYTE_ORDER_MARK_BYTES = len("\ufeff".encode())  # at the beginning of a file; no part of its text
LEAST_GROUP = 1 << 12  # characters encoded per call, so that the overhead of the call is negligible
GROUP_PER_TOKEN = 8  # characters per id of a window: a group is about two windows, so that other streams wait briefly
DOCUMENT_OVERHEAD = 64  # characters counted per document in addition, so that empty documents fill a group too


class Cursor(NamedTuple):
    """The cursor of a stream: the next token to read. Saved as a JSON list."""

    epoch: int = 0
    unit: int = 0  # index of the unit in the stream's units of this epoch
    document: int = 0  # index of the document in that unit
    token: int = 0  # index of the token in that document, including BOS
    skipped: int = 0  # unreadable records of the stream so far, in all epochs (`on_bad_record`)
    block: int = 0  # index of the shuffled block of the shard that has the document
    first: int = 0  # records of the shard before that block
    records: int = 0  # records in that block; 0 in older checkpoints


START = Cursor()


class SkippedRecord(NamedTuple):
    """An unreadable record: the `nth` unreadable one of its stream, its place in the source, and the reason. `source`:
    its name, in a mixture."""

    nth: int
    shard: int
    number: int
    what: str
    source: str = ""


class Window(NamedTuple):
    """The content of a row of a batch. `ids`: int64, shape (seq_len + 1,). `cursor`: the beginning of the next window.
    `documents`: the documents that the ids are from, in order, including the one in which the previous window ended.
    `skipped`: the unreadable records passed while this window was read. `starts`: the places in `ids` after 0 at which
    a document begins, or a piece that does not continue the ids before it. `uncounted`: the ranges of places whose ids
    are of prompts, which the loss does not count as labels."""

    ids: npt.NDArray[np.int64]
    cursor: Cursor
    documents: tuple[DocumentName, ...]
    skipped: tuple[SkippedRecord, ...] = ()
    starts: Sequence[int] = ()
    uncounted: Sequence[tuple[int, int]] = ()


class EncodedDocument(NamedTuple):
    """The ids (int32) of a document, or of a piece of one. `continues`: it goes on where the piece before it ended.
    `prompt`: the number of ids at its beginning that the loss does not count as labels."""

    ids: Ids
    cursor: Cursor
    document: DocumentId
    continues: bool
    prompt: int = 0


@dataclass(frozen=True)
class Streams:
    """All streams of a source. `seed`: of the shuffling; None keeps the source's order. `endless`: continues with the
    next epoch. `skip_bad`: skips unreadable records; they keep their numbers, so that cursors do not depend on it.
    `overlap` (0 or 1): the number of ids that a window shares with the next one. `most`: the number of windows after
    which a pass ends; None: at the end of the data."""

    source: Source
    tokenizer: Tokenizer
    seq_len: int
    count: int
    seed: int | str | None
    endless: bool = True
    skip_bad: bool = False
    overlap: int = 1
    most: int | None = None
    packing: str = "concat"

    def windows(self, stream: int, cursor: Cursor = START) -> Iterator[Window]:
        """Yields the windows of a stream from `cursor` on."""
        skipped: deque[SkippedRecord] = deque()  # read ahead of the windows
        documents = tokenized(self.documents(stream, cursor, skipped), self.tokenizer, self.seq_len)
        if self.packing == "pad":
            made = rows_of_records(documents, self.seq_len, cursor)
        else:
            made = windows(documents, self.seq_len, cursor, self.overlap)
        for window in islice(made, self.most):
            passed = []
            while skipped and skipped[0].nth <= window.cursor.skipped:
                passed.append(skipped.popleft())
            yield window._replace(skipped=tuple(passed)) if passed else window

    def documents(
        self, stream: int, cursor: Cursor = START, skipped: deque[SkippedRecord] | None = None
    ) -> Iterator[tuple[Document, Cursor]]:
        """Yields the documents of a stream from the one at `cursor` on, each with its own cursor.

        With `skip_bad`, unreadable records are added to `skipped`; otherwise BadRecord is raised. Raises UserError if
        the data have no document, if `cursor` is beyond them, or after `limits.BAD_RECORDS_IN_A_ROW` unreadable records
        in a row.
        """
        epoch, unit, skip, start = cursor.epoch, cursor.unit, cursor.document, cursor
        count, in_a_row = cursor.skipped, 0
        reached = skip == 0
        self.shard(stream, cursor)  # refuses a unit that does not exist
        empty = 0
        while empty <= EMPTY_EPOCHS + self.count:
            empty += 1
            units = self._units(stream, epoch)
            while unit < len(units):
                for number, record, block in self._records(units[unit], epoch, start):
                    if number < skip:
                        continue
                    reached = True
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
                if not reached:
                    raise _beyond(stream, cursor)
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
        while True:
            thread = threading.get_ident()
            stalls.READING[thread] = lambda: self._location_of(shard), time.monotonic()
            try:
                records, block = next(blocks)
            except StopIteration:
                return
            finally:
                stalls.READING.pop(thread, None)
            _, first, count = block
            for position, index in enumerate(self._order(count, f"shard {shard} block {block[0]}", epoch), first):
                # A file that was changed may have fewer records than its last block had.
                if position % parts == part and index < len(records):
                    yield position // parts, records[index], block

    def _location_of(self, shard: int) -> str:
        files = self.source.files
        return shortened(self.source.file_of(shard).path, 400) if files else f"shard {shard} of the data set"

    def shard(self, stream: int, cursor: Cursor) -> tuple[int, int]:
        """The shard at the cursor of a stream, and the number of its documents up to the cursor, including that one.

        Raises UserError if the stream has no such unit."""
        units = self._units(stream, cursor.epoch)
        if cursor.unit >= len(units):
            raise _beyond(stream, cursor)
        shard, part = divmod(int(units[cursor.unit]), self._parts)
        return shard, cursor.document * self._parts + part + 1

    def _order(self, count: int, what: str, epoch: int) -> npt.NDArray[np.int64]:
        return shuffled(count, f"{self.seed} {epoch} {what}") if self.seed is not None else np.arange(count)


def _beyond(stream: int, cursor: Cursor) -> UserError:
    what = f"its position in the data is beyond their end: stream {stream}, {cursor}"
    return UserError(
        Problem("the checkpoint", what, fix="restore the checkpoint, or remove it to start from the one before")
    )


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
        characters += record_size(record)
        if len(block) == BLOCK_RECORDS or characters >= BLOCK_CHARACTERS:
            yield block, (number, first, len(block))
            number, first, block, characters = number + 1, first + len(block), [], 0
    if block:
        yield block, (number, first, len(block))


def record_size(record: Record) -> int:
    """Bytes or characters."""
    cells = record.data if isinstance(record.data, tuple) else (record.data,)
    return sum(len(cell) for cell in cells if isinstance(cell, str | bytes))


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
    steps = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(mix_bits(steps), kind="stable")


def mix_bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64: a bijection of uint64 of which every output bit depends on all input bits."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def tokenized(
    documents: Iterable[tuple[Document, Cursor]], tokenizer: Tokenizer, seq_len: int
) -> Iterator[EncodedDocument]:
    """Yields the ids of each document, with BOS and EOS at the ends of whole documents.

    Texts are encoded in groups, because each call of the tokenizer has an overhead."""
    enough = max(LEAST_GROUP, GROUP_PER_TOKEN * seq_len)
    group: list[tuple[Document, Cursor, bool]] = []
    waiting, before = 0, None
    for document, cursor in documents:
        group.append((document, cursor, before is not None and _continues(before, document)))
        before = document
        waiting += len(document.text) + DOCUMENT_OVERHEAD
        if waiting >= enough:
            yield from _encode(group, tokenizer)
            group, waiting = [], 0
    yield from _encode(group, tokenizer)


def _continues(before: Document, document: Document) -> bool:
    """Whether a piece of a text goes on where the one before it ended: in the same shard or the next one, at its byte.
    Shuffled pieces rarely do."""
    if before.ends or document.begins:
        return False
    (_, shard, number), (_, next_shard, next_number) = before.id, document.id
    gap = next_number - number - len(before.text.encode())
    return next_shard - shard in (0, 1) and gap in ((0, BYTE_ORDER_MARK_BYTES) if before.begins else (0,))


def _encode(group: list[tuple[Document, Cursor, bool]], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    encoded = encode_documents([document for document, _, _ in group], tokenizer)
    for (document, cursor, continues), (ids, prompt) in zip(group, encoded, strict=True):
        yield EncodedDocument(ids, cursor, document.id, continues, prompt)


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[Ids, int]]:
    """Yields the ids (int32) of each document, with BOS and EOS at the ends of whole documents, and how many of them
    are those of BOS and a prompt; 0 without a prompt. Prompt and text are encoded apart."""
    # If one token is both BOS and EOS, only the one at the end separates two documents.
    bos = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    prompts = [document.text[: document.prompt] for document in documents if document.prompt]
    texts = [document.text[document.prompt :] if document.prompt else document.text for document in documents]
    encoded = iter(tokenizer.encode_batch([*texts, *prompts]) if documents else [])
    of_texts = list(islice(encoded, len(texts)))
    for document, ids in zip(documents, of_texts, strict=True):
        before = np.array(bos if document.begins else [], np.int32)
        after = np.array(eos if document.ends else [], np.int32)
        if document.prompt:
            before = np.concatenate((before, next(encoded)))
        yield np.concatenate((before, ids, after)), len(before) if document.prompt else 0


def windows(
    documents: Iterable[EncodedDocument], seq_len: int, start: Cursor = START, overlap: int = 1
) -> Iterator[Window]:
    """Yields windows of seq_len + 1 ids. Each begins with the last `overlap` ids (0 or 1) of the window before.

    With overlap 1, every token is a label exactly once, and a last partial window is short, if it has at least one
    token and its label. With overlap 0, the first id of a window is never a label, and a last partial window is
    dropped.

    The first `start.token` tokens of the document at `start` were read before and are skipped. If that document no
    longer exists, nothing of the next one is skipped.
    """
    window = np.empty(seq_len + 1, np.int64)
    filled = 0
    cursor = START
    inside: list[DocumentId] = []
    starts: list[int] = []
    uncounted: list[tuple[int, int]] = []
    for ids, cursor, document, continues, prompt in documents:
        at = start.token if cursor[:3] == start[:3] else 0
        if at < len(ids):
            inside.append(document)
            if filled and not continues:
                starts.append(filled)
        while at < len(ids):
            taken = min(len(ids) - at, seq_len + 1 - filled)
            window[filled : filled + taken] = ids[at : at + taken]
            if at < prompt:
                uncounted.append((filled, filled + min(prompt - at, taken)))
            filled, at = filled + taken, at + taken
            if filled == seq_len + 1:
                yield Window(window, cursor._replace(token=at - overlap), tuple(inside), (), starts, uncounted)
                last = window[-1]
                window = np.empty(seq_len + 1, np.int64)
                window[0], filled = last, overlap
                inside, starts, uncounted = [document] if at - overlap < len(ids) else [], [], []
    if overlap and filled > 1:
        yield Window(window[:filled], cursor, tuple(inside), (), starts, uncounted)


def rows_of_records(documents: Iterable[EncodedDocument], seq_len: int, start: Cursor = START) -> Iterator[Window]:
    """Yields one window for each document, or piece of a long text, with its first seq_len + 1 ids at most. A document
    of one id has no label, and gives no window."""
    for ids, cursor, document, _, prompt in documents:
        if len(ids) > 1 and not (cursor[:3] == start[:3] and start.token):
            uncounted = [(0, min(prompt, seq_len + 1))] if prompt else []
            row = ids[: seq_len + 1].astype(np.int64)
            yield Window(row, cursor._replace(token=len(ids)), (document,), (), (), uncounted)
