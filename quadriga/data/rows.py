"""What a row of a batch consists of: its documents, where they are, and their ids. No batch is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga.data.mixture_data import MixtureData
from quadriga.data.streams import START, Cursor, Streams, tokenized
from quadriga.data.token_files import TokenFiles
from quadriga.data.windows import Windows


class RowPart(NamedTuple):
    """The ids of one document in a row, int64. `document`: as in `Batch.documents`; None if nothing separates
    documents. `location`: file, and line, row or position. `continued`, `continues`: it has ids before and after."""

    document: tuple[int | str, ...] | None
    location: str
    ids: npt.NDArray[np.int64]
    continued: bool
    continues: bool


def text_row(streams: Streams, stream: int, cursor: Cursor) -> list[RowPart]:
    """The row of a stream that begins at a cursor. The last row of a pass can be short, and so can a row of one
    record."""
    parts: list[RowPart] = []
    left = streams.seq_len + 1
    for ids, at, document, *_ in tokenized(streams.documents(stream, cursor), streams.tokenizer, streams.seq_len):
        start = cursor.token if at[:3] == cursor[:3] else 0
        if streams.packing == "pad" and (start or len(ids) < 2):  # read before, or no record with a label
            continue
        taken = ids[start : start + left].astype(np.int64)
        if len(taken):
            location = streams.source.format_location(document[1], document[2])
            parts.append(RowPart(document, location, taken, start > 0, start + len(taken) < len(ids)))
        left -= len(taken)
        if not left or streams.packing == "pad":
            break
    return parts


def text_rows(streams: Streams, stream: int, cursor: Cursor = START) -> Iterator[list[RowPart]]:
    """The rows of a stream, one after another, from a cursor on."""
    for window in streams.windows(stream, cursor):
        yield text_row(streams, stream, cursor)
        cursor = window.cursor


def token_row(files: TokenFiles, windows: Windows, slot: int) -> list[RowPart]:
    """The row of a slot (`data.windows`)."""
    start, stop = windows.bounds(int(windows.at([slot])[0]))
    epoch, ids, parts = slot // windows.count, files.read(start, stop), files.parts(start, stop)
    ends = set((files.borders(max(start - 1, 0), stop) + max(start - 1, 0)).tolist())
    found = []
    for document, first, after in parts:
        name = None if document is None else (epoch, *document)
        continued = document is not None and first not in ends and first > 0
        continues = document is not None and after not in ends
        location = files.format_location(first)
        found.append(RowPart(name, location, ids[first - start : after - start], continued, continues))
    return found


def mixture_row(
    data: MixtureData, texts: Mapping[int, tuple[Streams, Mapping[int, Cursor]]], step: int, row: int
) -> list[RowPart]:
    """A row of the global batch of step `step` (from 1) of a mixture.

    texts: by index of the source, its streams, and by stream the cursor at the beginning of the step.
    """
    sources, numbers = data.mixture.rows(step - 1)
    index, number = int(sources[row]), int(numbers[row])
    name = data.names[index]
    if name in data.tokens:
        parts = token_row(*data.tokens[name], number)
    else:
        streams, cursors = texts[index]
        if streams.seed is None:  # its windows of this step are in order
            before = int(np.count_nonzero(numbers[sources == index] < number))
            parts = next(islice(text_rows(streams, 0, cursors[0]), before, None))
        else:
            parts = text_row(streams, row, cursors[row])
    return [part._replace(document=(name, *(part.document or ()))) for part in parts]


def row_ids(parts: list[RowPart]) -> list[int]:
    """The ids of a row."""
    return list(chain.from_iterable(part.ids.tolist() for part in parts))
