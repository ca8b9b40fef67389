"""Tokenizes documents and packs the ids into fixed windows. Every item has the cursor at which reading continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga.data.sources import Document, DocumentId
from quadriga.data.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

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
    """An unreadable record: the `nth` unreadable one of its stream, its place in the source, and the reason."""

    nth: int
    shard: int
    number: int
    what: str


class Window(NamedTuple):
    """The content of a row of a batch. `ids`: int64, shape (seq_len + 1,). `cursor`: the beginning of the next window.
    `documents`: the documents that the ids are from, in order, including the one in which the previous window ended.
    `skipped`: the unreadable records passed while this window was read."""

    ids: npt.NDArray[np.int64]
    cursor: Cursor
    documents: tuple[DocumentId, ...]
    skipped: tuple[SkippedRecord, ...] = ()


def tokenized(
    documents: Iterable[tuple[Document, Cursor]], tokenizer: Tokenizer, seq_len: int
) -> Iterator[tuple[Ids, Cursor, DocumentId]]:
    """Yields the ids (int32) of each document, with BOS and EOS at the ends of whole documents.

    Texts are encoded in groups, because each call of the tokenizer has an overhead."""
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
    # If one token is both BOS and EOS, only the one at the end separates two documents.
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
