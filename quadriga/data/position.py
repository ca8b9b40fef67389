"""Converts torchtitan's position in the data to a cursor of an unshuffled stream, and back.

torchtitan's loader keeps the number of documents of the epoch that it has read, and their ids that no window has yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from quadriga.data.sources import Document
from quadriga.data.streams import START, Cursor, Streams, tokenized
from quadriga.errors import Problem, UserError

DocumentCursor = tuple[Document, Cursor]


def cursor_before(streams: Streams, documents: int, tokens_left: int) -> Cursor:
    """The cursor `tokens_left` ids before the end of the `documents`-th document of an epoch; 0: before the first.

    If the documents up to there have fewer ids, the missing ones are the last ids of the epoch before.
    Raises UserError if the data have fewer documents or ids.
    """
    if documents < 0 or tokens_left < 0:
        raise ValueError(f"no position {tokens_left} ids before the end of document {documents}")
    for epoch in (0, 1):
        keep = tokens_left + 1  # a document has at least one id, except possibly an empty one
        while True:
            tail = deque(_up_to(streams, documents, epoch), keep)
            cursor = _within(streams, tail, tokens_left)
            if cursor is not None or len(tail) < keep:
                break
            keep *= 2
        if cursor is not None:
            return cursor
    what = f"have fewer than {tokens_left:,} ids before the end of document {documents:,}"
    raise UserError(Problem("the training data", what, fix="use the data that the state was saved with"))


def read_so_far(streams: Streams, cursor: Cursor) -> tuple[int, list[int]]:
    """The reverse of `cursor_before`: the number of documents of the epoch read at a cursor, and their ids that no
    window has yet. The document at the cursor counts as read.

    Raises UserError if the data end before the cursor.
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
            ids = [int(one) for part in tokenized(rest, streams.tokenizer, streams.seq_len) for one in part.ids]
            return read, ids[cursor.token :]
    what = "end before the position at which the checkpoint was saved"
    raise UserError(Problem("the training data", what, fix="use the data that the run was started with"))


def _up_to(streams: Streams, documents: int, epoch: int) -> Iterator[DocumentCursor]:
    """All pieces of documents from the start of the stream to the end of the `documents`-th one of `epoch`."""
    read = 0
    for document, cursor in streams.documents(0):
        if cursor.epoch > epoch:
            if read < documents:
                what = f"have {read:,} documents, fewer than the {documents:,} that were read"
                raise UserError(Problem("the training data", what, fix="use the data that the state was saved with"))
            return
        if cursor.epoch == epoch and read == documents:
            return
        read += document.ends and cursor.epoch == epoch
        yield document, cursor


def _within(streams: Streams, tail: deque[DocumentCursor], tokens_left: int) -> Cursor | None:
    """The cursor `tokens_left` ids before the end of the pieces; None if they have fewer ids."""
    if not tail:
        return START if tokens_left == 0 else None
    encoded = list(tokenized(tail, streams.tokenizer, streams.seq_len))
    for piece in reversed(encoded):
        if len(piece.ids) >= tokens_left:
            return piece.cursor._replace(token=len(piece.ids) - tokens_left)
        tokens_left -= len(piece.ids)
    return None
