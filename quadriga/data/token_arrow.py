"""Columns of token ids in Arrow files: IPC files, and IPC streams such as those of the library `datasets`.

Only the metadata of record batches are read here, which are flatbuffers. Ids and lists are then read in place. So a
file is neither mapped into memory, nor is a whole record batch read for a few ids of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga.data.arrow_messages import (
    BATCH_BUFFERS,
    BATCH_COMPRESSION,
    BATCH_NODES,
    BUFFER,
    NODE,
    RECORD_BATCH,
    Message,
    buffer_place,
    damaged_arrow,
    node_and_buffer_counts,
    read_messages,
)
from quadriga.data.files import File
from quadriga.data.sources import require_library
from quadriga.data.stored_arrays import OpenFiles, StoredArray, path_of
from quadriga.data.token_columns import WITHOUT_NULLS, ColumnFile, IdColumn, find_id_column
from quadriga.data.token_formats import Documents, TokenFile, TokenOptions, documents_between
from quadriga.errors import Problem, UserError, shortened

UNCOMPRESSED = 'write it uncompressed: pyarrow.feather.write_feather(table, FILE, compression="uncompressed")'


class ArrowBatch(NamedTuple):
    """A record batch's column of ids. Offsets count the bytes of the file."""

    rows: int
    ids: int
    values_at: int  # offset of the first id
    bounds_at: int  # offset of the first bound of lists


class ArrowColumn(ColumnFile):
    """A part is a record batch, not compressed, so that its ids and lists can be read in place."""

    def __init__(
        self, files: OpenFiles, file: File, column: IdColumn, bounds: np.dtype[Any], batches: Sequence[ArrowBatch]
    ) -> None:
        super().__init__(file, column, [batch.ids for batch in batches], [batch.rows for batch in batches])
        self._files = files
        self._bounds = bounds
        self._places = np.array([batch[2:] for batch in batches], np.int64).reshape(-1, 2)

    def _values(self, part: int, start: int, stop: int) -> npt.NDArray[Any]:
        return StoredArray(self._files, self.file, self.dtype, int(self._places[part, 0]), stop).read(start, stop)

    def _lists(self, part: int, start: int, stop: int) -> Documents:
        if self.column.width:
            numbers = np.arange(start // self.column.width, (stop - 1) // self.column.width + 1)
            return Documents(numbers, (numbers + 1) * self.column.width)
        rows = int(self.parts.rows[part + 1] - self.parts.rows[part])
        bounds = StoredArray(self._files, self.file, self._bounds, int(self._places[part, 1]), rows + 1)
        base = bounds.at(0)
        try:
            found = documents_between(bounds, start + base, stop + base)
        except ValueError as error:
            raise UserError(damaged_arrow(self.file, f"record batch {part}: {error}")) from error
        return Documents(found.numbers, found.ends - base)


def open_arrow(files: OpenFiles, file: File, options: TokenOptions) -> TokenFile:
    """Reads the metadata of all record batches, and two bounds of each."""
    require_library("pyarrow", path_of(file), "an Arrow file")
    try:
        schema, _, messages = read_messages(files, file)
        column = find_id_column(file, schema, options)
        layout = _Layout(schema, column)
        messages = (message for message in messages if message.type == RECORD_BATCH)
        batches = [_batch(files, file, message, number, column, layout) for number, message in enumerate(messages)]
        if sum(batch.ids for batch in batches) * column.dtype.itemsize > file.size:
            raise ValueError("several of its record batches have the same ids")
    except UserError:
        raise
    except Exception as error:  # pyarrow and struct raise many kinds of errors for damaged files
        raise UserError(damaged_arrow(file, error)) from error
    return ArrowColumn(files, file, column, layout.bounds, batches)


class _Layout:
    """Where a record batch lists the column: its first node and buffer, and by that the buffer of the ids.

    A list has the buffers validity, bounds, and those of its values: validity and data. A list of fixed size has no
    bounds. bounds: the dtype of bounds.
    """

    def __init__(self, schema: Any, column: IdColumn) -> None:
        import pyarrow

        before = [node_and_buffer_counts(schema.field(index).type) for index in range(column.position)]
        self.node = sum(nodes for nodes, _ in before)
        self.buffer = sum(buffers for _, buffers in before)
        self.values = 1 + 2 * column.is_list - bool(column.width)
        self.bounds = np.dtype("<i8" if pyarrow.types.is_large_list(schema.field(column.position).type) else "<i4")


def _batch(
    files: OpenFiles, file: File, message: Message, number: int, column: IdColumn, layout: _Layout
) -> ArrowBatch:
    """The column's place in a record batch. Raises UserError or ValueError."""
    where = f"{path_of(file)}, record batch {number}"
    if message.header.table(BATCH_COMPRESSION) is not None:
        raise UserError(Problem(where, "its columns are compressed, so single ids cannot be read", fix=UNCOMPRESSED))
    nodes = message.header.structs(BATCH_NODES, NODE)
    buffers = message.header.structs(BATCH_BUFFERS, BUFFER)
    rows, ids = nodes[layout.node][0], nodes[layout.node + column.is_list][0]
    if nodes[layout.node][1] or nodes[layout.node + column.is_list][1]:
        what = f"the column `{shortened(column.name)}` has nulls"
        raise UserError(Problem(where, what, allowed="integers", fix=WITHOUT_NULLS))
    first = bounds_at = 0
    if column.width:
        ids = rows * column.width
    elif column.is_list:
        bounds_at = buffer_place(message, buffers[layout.buffer + 1], (rows + 1) * layout.bounds.itemsize)
        bounds = StoredArray(files, file, layout.bounds, bounds_at, rows + 1)
        first, last = bounds.at(0), bounds.at(rows)
        if not 0 <= first <= last <= ids:
            raise ValueError(f"the lists of record batch {number} do not fit its values")
        ids = last - first
    values_at = buffer_place(message, buffers[layout.buffer + layout.values], (first + ids) * column.dtype.itemsize)
    return ArrowBatch(rows, ids, values_at + first * column.dtype.itemsize, bounds_at)
