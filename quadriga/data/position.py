"""The place in an unshuffled stream that another program's count of documents means.

torchtitan's loader keeps how many documents of the epoch it has read, and the ids of them that no window took yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from quadriga.data.lanes import Lanes
from quadriga.data.packing import START, Place, tokenized
from quadriga.data.sources import Document
from quadriga.errors import Problem, UserError

Placed = tuple[Document, Place]


def place_before(lanes: Lanes, documents: int, tokens_left: int) -> Place:
    """The place `tokens_left` ids before the end of the `documents`-th document of an epoch; 0: before the first.

    Ids that the documents up to there do not hold are the last of the epoch before.
    Raises UserError where the data hold fewer documents or ids.
    """
    if documents < 0 or tokens_left < 0:
        raise ValueError(f"no place {tokens_left} ids before the end of document {documents}")
    for epoch in (0, 1):
        keep = tokens_left + 1  # a document has an id at least, except where a tokenizer gives an empty one none
        while True:
            tail = deque(_up_to(lanes, documents, epoch), keep)
            place = _within(lanes, tail, tokens_left)
            if place is not None or len(tail) < keep:
                break
            keep *= 2
        if place is not None:
            return place
    what = f"hold fewer ids than the {tokens_left:,} that are to come before the end of document {documents:,}"
    raise UserError(Problem("the training data", what, fix="name the data that the state was saved with"))


def read_so_far(lanes: Lanes, place: Place) -> tuple[int, list[int]]:
    """The reverse of `place_before`: how many documents of the epoch are read at a place, and their ids that no window
    took yet. The document at the place counts as read.

    Raises UserError where the data do not reach that far.
    """
    if place == START:
        return 0, []
    read, rest, inside = 0, list[Placed](), False
    for document, at in lanes.documents(0, Place(epoch=place.epoch)):
        inside = inside or at[:3] == place[:3]
        if at.epoch > place.epoch:
            break
        if inside:
            rest.append((document, at))
        read += document.ends
        if inside and document.ends:
            ids = [int(one) for part, _, _ in tokenized(rest, lanes.tokenizer, lanes.seq_len) for one in part]
            return read, ids[place.token :]
    what = "end before the place at which the checkpoint was saved"
    raise UserError(Problem("the training data", what, fix="name the data that the run was started with"))


def _up_to(lanes: Lanes, documents: int, epoch: int) -> Iterator[Placed]:
    """All pieces of documents from the start of the stream to the end of the `documents`-th one of `epoch`."""
    read = 0
    for document, place in lanes.documents(0):
        if place.epoch > epoch:
            if read < documents:
                what = f"hold {read:,} documents, fewer than the {documents:,} that were read of them"
                raise UserError(Problem("the training data", what, fix="name the data that the state was saved with"))
            return
        if place.epoch == epoch and read == documents:
            return
        read += document.ends and place.epoch == epoch
        yield document, place


def _within(lanes: Lanes, tail: deque[Placed], tokens_left: int) -> Place | None:
    """The place so many ids before the end of the pieces; None where they hold fewer."""
    if not tail:
        return START if tokens_left == 0 else None
    encoded = list(tokenized(tail, lanes.tokenizer, lanes.seq_len))
    for ids, place, _ in reversed(encoded):
        if len(ids) >= tokens_left:
            return place._replace(token=len(ids) - tokens_left)
        tokens_left -= len(ids)
    return None
