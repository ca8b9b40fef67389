"""Ids of one file, checked, and where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from quadriga.data.stored_arrays import path_of
from quadriga.data.token_formats import TokenFile
from quadriga.errors import Problem, UserError

VERIFIED_AT_ONCE = 1 << 20  # ids


def location_of(part: TokenFile, position: int) -> str:
    """The location of an id for a message."""
    return f"{path_of(part.file)}, token {position:,}"


def checked_ids(part: TokenFile, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Ids [start, stop) of a file as int64. Raises UserError for negative ids, and for those above int64."""
    stored = part.read(start, stop)
    ids = stored.astype(np.int64)
    if (part.dtype.kind == "i" or part.dtype.itemsize == 8) and ids.min() < 0:
        wrong = int(np.flatnonzero(ids < 0)[0])
        raise UserError(_wrong_id(part, start + wrong, stored[wrong], 1, None))
    return ids


def wrong_ids(part: TokenFile, vocab_size: int | None) -> Iterator[Problem]:
    """One problem with the first of the negative ids, and one with the first of those that are too large."""
    most = np.iinfo(np.int64).max if vocab_size is None else vocab_size - 1
    first: dict[bool, tuple[int, Any]] = {}  # by whether it is negative, the first wrong id
    count = {True: 0, False: 0}
    for start in range(0, part.length, VERIFIED_AT_ONCE):
        ids = part.read(start, min(start + VERIFIED_AT_ONCE, part.length))
        for negative, wrong in ((True, ids < 0), (False, ids > most)):
            if found := int(np.count_nonzero(wrong)):
                at = int(np.argmax(wrong))
                first.setdefault(negative, (start + at, ids[at]))
                count[negative] += found
    for negative, (position, value) in first.items():
        yield _wrong_id(part, position, value, count[negative], vocab_size)


def _wrong_id(part: TokenFile, position: int, value: Any, count: int, vocab_size: int | None) -> Problem:
    where, more = location_of(part, position), f", the first of {count:,} such ids" if count > 1 else ""
    if value < 0:
        what, allowed = f"the id {value} is negative{more}", "ids from 0 on"
    elif vocab_size is None:
        what, allowed = f"the id {value} is above the largest int64{more}", "ids below 2^63"
    else:
        what, allowed = f"the id {value} is not in the vocabulary{more}", f"ids below {vocab_size:,}"
    fix = "check that the files were written with this tokenizer, and their type of ids"
    return Problem(where, what, allowed=allowed, fix=fix)
