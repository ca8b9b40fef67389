"""Documents to ids to fixed windows. Every item comes with the cursor from which reading starts again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga.data.sources import Document, DocumentId
from quadriga.data.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

LEAST_GROUP = 1 << 12  # characters encoded in one call: enough that the call costs nothing ...
GROUP_PER_TOKEN = 8  # ... and about two windows of text, so that no stream keeps the others waiting for long
DOCUMENT_OVERHEAD = 64  # what a document counts beside its characters, so that empty ones fill a group too


class Cursor(NamedTuple):
    """The cursor of a stream: the next token to read. JSON-able, as a list."""

    epoch: int = 0
    unit: int = 0  # which of the stream's units of this epoch
    document: int = 0  # which document of that unit
    token: int = 0  # which token of that document, its BOS included
    skipped: int = 0  # how many records of the stream could not be read so far, in all epochs (`on_bad_record`)
    block: int = 0  # which block of the shard, of those that are shuffled, the document is in ...
    first: int = 0  # ... how many records of the shard come before it ...
    records: int = 0  # ... and how many it has; 0 where an older checkpoint does not say


START = Cursor()


class SkippedRecord(NamedTuple):
    """A record that could not be read: the `nth` of its stream, where in the source, and why."""

    nth: int
    shard: int
    number: int
    what: str


class Window(NamedTuple):
    """What a row of a batch is made of. `ids`: (seq_len + 1,) int64; `cursor`: where the next window begins;
    `documents`: those that the ids are from, in order, the one that the window before ended in included; `skipped`:
    the records that were met on the way and could not be read."""

    ids: npt.NDArray[np.int64]
    cursor: Cursor
    documents: tuple[DocumentId, ...]
    skipped: tuple[SkippedRecord, ...] = ()


def tokenized(
    documents: Iterable[tuple[Document, Cursor]], tokenizer: Tokenizer, seq_len: int
) -> Iterator[tuple[Ids, Cursor, DocumentId]]:
    """The ids of each document, with BOS and EOS at the ends of whole documents. Texts are encoded in groups."""
    enough = max(LEAST_GROUP, GROUP_PER_TOKEN * seq_len)
    group: list[tuple[Document, Cursor]] = []
    waiting = 0
    for document, cursor in documents:
        group.append((document, cursor))
        waiting += len(document.text) + DOCUMENT_OVERHEAD
        if waiting >= enough:
            yield from _encode(group, tokenizer)
            group, waiting = [], 0
    yield from _encode(group, tokenizer)


def _encode(group: list[tuple[Document, Cursor]], tokenizer: Tokenizer) -> Iterator[tuple[Ids, Cursor, DocumentId]]:
    # Where one token is both, one of them separates two documents: that at the end.
    bos = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = tokenizer.encode_batch([document.text for document, _ in group]) if group else []
    for (document, cursor), ids in zip(group, encoded, strict=True):
        before = np.array(bos if document.begins else [], np.int32)
        after = np.array(eos if document.ends else [], np.int32)
        yield np.concatenate((before, ids, after)), cursor, document.id


def windows(
    documents: Iterable[tuple[Ids, Cursor, DocumentId]], seq_len: int, start: Cursor = START, overlap: int = 1
) -> Iterator[Window]:
    """Windows of seq_len + 1 ids, each of which begins with the last `overlap` ids (0 or 1) of the one before.

    With an overlap of 1 every token is a label exactly once, and a last window that is not full comes out short, if it
    holds at least one token and its label. With 0 the first id of a window is no label of any, and what is left at the
    end is left out.

    The first `start.token` tokens of the document at `start` were read before; where that document is not there any
    more, nothing is skipped of the one that comes instead.
    """
    window = np.empty(seq_len + 1, np.int64)
    filled = 0
    cursor = START
    inside: list[DocumentId] = []
    for ids, cursor, document in documents:
        at = start.token if cursor[:3] == start[:3] else 0
        if at < len(ids):
            inside.append(document)
        while at < len(ids):
            taken = min(len(ids) - at, seq_len + 1 - filled)
            window[filled : filled + taken] = ids[at : at + taken]
            filled, at = filled + taken, at + taken
            if filled == seq_len + 1:
                yield Window(window, cursor._replace(token=at - overlap), tuple(inside))
                last = window[-1]
                window = np.empty(seq_len + 1, np.int64)
                window[0], filled = last, overlap
                inside = [document] if at - overlap < len(ids) else []
    if overlap and filled > 1:
        yield Window(window[:filled], cursor, tuple(inside))
