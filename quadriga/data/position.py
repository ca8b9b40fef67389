"""The place in an unshuffled stream that another program's count of documents means.

torchtitan's loader keeps how many documents of the epoch it has read, and the ids of them that no window took yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from quadriga.data.packing import START, Cursor, tokenized
from quadriga.data.sources import Document
from quadriga.data.streams import Streams
from quadriga.errors import Problem, UserError

DocumentCursor = tuple[Document, Cursor]


def cursor_before(streams: Streams, documents: int, tokens_left: int) -> Cursor:
    """The place `tokens_left` ids before the end of the `documents`-th document of an epoch; 0: before the first.

    Ids that the documents up to there do not hold are the last of the epoch before.
    Raises UserError where the data hold fewer documents or ids.
    """
    if documents < 0 or tokens_left < 0:
        raise ValueError(f"no place {tokens_left} ids before the end of document {documents}")
    for epoch in (0, 1):
        keep = tokens_left + 1  # a document has an id at least, except where a tokenizer gives an empty one none
        while True:
            tail = deque(_up_to(streams, documents, epoch), keep)
            cursor = _within(streams, tail, tokens_left)
            if cursor is not None or len(tail) < keep:
                break
            keep *= 2
        if cursor is not None:
            return cursor
    what = f"hold fewer ids than the {tokens_left:,} that are to come before the end of document {documents:,}"
    raise UserError(Problem("the training data", what, fix="name the data that the state was saved with"))


def read_so_far(streams: Streams, cursor: Cursor) -> tuple[int, list[int]]:
    """The reverse of `cursor_before`: how many documents of the epoch are read at a place, and their ids that no window
    took yet. The document at the place counts as read.

    Raises UserError where the data do not reach that far.
    """
    if cursor == START:
        return 0, []
    read, rest, inside = 0, list[DocumentCursor](), False
    for document, at in streams.documents(0, Cursor(epoch=cursor.epoch)):
        inside = inside or at[:3] == cursor[:3]
        if at.epoch > cursor.epoch:
            break
        if inside:
            rest.append((document, at))
        read += document.ends
        if inside and document.ends:
            ids = [int(one) for part, _, _ in tokenized(rest, streams.tokenizer, streams.seq_len) for one in part]
            return read, ids[cursor.token :]
    what = "end before the place at which the checkpoint was saved"
    raise UserError(Problem("the training data", what, fix="name the data that the run was started with"))


def _up_to(streams: Streams, documents: int, epoch: int) -> Iterator[DocumentCursor]:
    """All pieces of documents from the start of the stream to the end of the `documents`-th one of `epoch`."""
    read = 0
    for document, cursor in streams.documents(0):
        if cursor.epoch > epoch:
            if read < documents:
                what = f"hold {read:,} documents, fewer than the {documents:,} that were read of them"
                raise UserError(Problem("the training data", what, fix="name the data that the state was saved with"))
            return
        if cursor.epoch == epoch and read == documents:
            return
        read += document.ends and cursor.epoch == epoch
        yield document, cursor


def _within(streams: Streams, tail: deque[DocumentCursor], tokens_left: int) -> Cursor | None:
    """The place so many ids before the end of the pieces; None where they hold fewer."""
    if not tail:
        return START if tokens_left == 0 else None
    encoded = list(tokenized(tail, streams.tokenizer, streams.seq_len))
    for ids, cursor, _ in reversed(encoded):
        if len(ids) >= tokens_left:
            return cursor._replace(token=len(ids) - tokens_left)
        tokens_left -= len(ids)
    return None
