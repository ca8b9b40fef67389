"""Texts in Arrow files, and in the folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.

Columns of strings or bytes that are not compressed are read in place, a few rows at once, so that memory does not grow
with the record batches. Of other columns, whole record batches are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.data.arrow_messages import (
    BATCH_BUFFERS,
    BATCH_COMPRESSION,
    BATCH_NODES,
    BATCH_ROWS,
    BUFFER,
    DICTIONARY_BATCH,
    END_OF_STREAM,
    NODE,
    Message,
    buffer_place,
    damaged_arrow,
    node_and_buffer_counts,
    read_message,
    read_messages,
)
from quadriga.data.columns import ROWS_AT_ONCE, cells_of, require_text_columns
from quadriga.data.files import File, describe_files, find_files
from quadriga.data.recognize import refuse_if_foreign
from quadriga.data.row_source import RowSource
from quadriga.data.sources import Cell, require_library
from quadriga.data.stored_arrays import OpenFiles, path_of
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.reading import read_json_object
from quadriga.units import format_some

BYTES_AT_ONCE = 1 << 24
OF_SPLITS, OF_DATA = "dataset_dict.json", "state.json"  # written by `save_to_disk` of a DatasetDict and of a Dataset


class ArrowTextSource(RowSource):
    """A shard is a record batch. Only its metadata are read when the file is opened."""

    def __init__(self, files: Sequence[File], keys: TextKeys) -> None:
        self._open = OpenFiles()
        self._known: dict[File, _ArrowFile] = {}
        super().__init__("arrow", files, keys)

    def _group_sizes(self, file: File) -> list[int]:
        refuse_if_foreign(file, "arrow")
        require_library("pyarrow", path_of(file), "an Arrow file")
        schema, first, messages = read_messages(self._open, file)
        require_text_columns(path_of(file), schema, self.keys, self.template)
        known = _ArrowFile(schema, (first.start, first.end), [], [])
        for message in messages:
            if message.type == DICTIONARY_BATCH:
                known.dictionaries.append((len(known.batches), message.start, message.end))
            else:
                known.batches.append(_Batch(message.start, message.end, message.header.number(BATCH_ROWS, "<q")))
        self._known[file] = known
        return [batch.rows for batch in known.batches]

    def _rows(self, file: File, groups: range) -> Iterator[Cell | tuple[Cell, ...]]:
        known = self._known[file]
        for number in groups:
            columns = self._in_place(file, known, number)
            if columns is None:
                yield from self._whole_batch(file, known, number)
            elif self.template.is_one_field:
                yield from columns[0].cells(self._open, file)
            else:
                yield from zip(*(column.cells(self._open, file) for column in columns), strict=True)

    def _damaged(self, file: File, error: Exception, where: str = "") -> Problem:
        return damaged_arrow(file, error, where)

    def _in_place(self, file: File, known: _ArrowFile, number: int) -> list[_Column] | None:
        """Where the columns of a record batch are; None if their cells are not stored as they are."""
        batch = known.batches[number]
        message = known.message(self._open, file, number)
        if message.header.table(BATCH_COMPRESSION) is not None:
            return None
        columns = []
        for name in self.template.names:
            position = known.schema.get_field_index(name)
            width = _offset_width(known.schema.field(position).type)
            try:
                before = [node_and_buffer_counts(known.schema.field(index).type) for index in range(position)]
            except ValueError:  # a type whose buffers are not counted
                return None
            if not width:
                return None
            nodes, buffers = (message.header.structs(*each) for each in ((BATCH_NODES, NODE), (BATCH_BUFFERS, BUFFER)))
            node, first = sum(count for count, _ in before), sum(count for _, count in before)
            rows, nulls = nodes[node]
            if rows != batch.rows:
                raise ValueError(f"the columns of record batch {number} have different lengths")
            validity, offsets, data = buffers[first : first + 3]
            columns.append(
                _Column(
                    rows,
                    buffer_place(message, validity, (rows + 7) // 8) if nulls else None,
                    buffer_place(message, offsets, (rows + 1) * width if rows else 0),
                    np.dtype(f"<i{width}"),
                    buffer_place(message, data, 0),
                    data[1],
                )
            )
        return columns

    def _whole_batch(self, file: File, known: _ArrowFile, number: int) -> Iterator[Cell | tuple[Cell, ...]]:
        """The rows of a record batch that is read whole, as a stream of its own with the dictionaries before it."""
        import pyarrow

        batch = known.batches[number]
        parts = [known.first, *((start, end) for before, start, end in known.dictionaries if before <= number)]
        parts.append((batch.start, batch.end))
        message = known.message(self._open, file, number)
        size = sum(end - start for start, end in parts)
        if message.header.table(BATCH_COMPRESSION) is not None:
            size += self._uncompressed_size(file, message)
        if size > limits.ARROW_BATCH_BYTES:
            what = f"record batch {number} has {size:,} bytes, and columns that are compressed or dictionaries"
            fix = "write it with smaller record batches (max_chunksize=1000), or as Parquet"
            allowed = f"at most {limits.ARROW_BATCH_BYTES:,} bytes, because such batches are read whole"
            raise UserError(Problem(path_of(file), what, allowed=allowed, fix=fix))
        content = b"".join(self._open.read(file, start, end - start) for start, end in parts) + END_OF_STREAM
        fields = sorted({known.schema.get_field_index(name) for name in self.template.names})
        options = pyarrow.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(content), options=options) as stream:
            for table in stream:
                table.validate(full=True)
                for start in range(0, table.num_rows, ROWS_AT_ONCE):
                    yield from cells_of(table.slice(start, ROWS_AT_ONCE), self.template)

    def _uncompressed_size(self, file: File, message: Message) -> int:
        """The sum of what the buffers of a compressed record batch say of themselves."""
        found = 0
        for offset, length in message.header.structs(BATCH_BUFFERS, BUFFER):
            if length > 0:
                at = buffer_place(message, (offset, length), 8)
                found += max(struct.unpack("<q", self._open.read(file, at, 8))[0], 0)
        return found


class _Batch(NamedTuple):
    """The bytes of a record batch in its file, with its metadata, and its number of rows."""

    start: int
    end: int
    rows: int


class _ArrowFile(NamedTuple):
    """first: the bytes of the schema. dictionaries: of each, the record batches before it, and its bytes."""

    schema: Any
    first: tuple[int, int]
    batches: list[_Batch]
    dictionaries: list[tuple[int, int, int]]

    def message(self, files: OpenFiles, file: File, number: int) -> Message:
        message = read_message(files, file, self.batches[number].start)
        if message is None or message.end != self.batches[number].end:
            raise ValueError(f"record batch {number} was changed")
        return message


class _Column(NamedTuple):
    """A column of a record batch in its file. `validity`: the first byte of its bitmap; None if no cell is null."""

    rows: int
    validity: int | None
    offsets: int
    offset_type: np.dtype[Any]
    data: int
    data_bytes: int

    def cells(self, files: OpenFiles, file: File) -> Iterator[bytes | None]:
        """The cells, of which those that are longer than a document may be are cut."""
        row = 0
        while row < self.rows:
            bounds = self._bounds(files, file, row, min(row + ROWS_AT_ONCE, self.rows))
            count = max(int(np.searchsorted(bounds, bounds[0] + BYTES_AT_ONCE, side="right")) - 1, 1)
            bounds = bounds[: count + 1]
            first, most = int(bounds[0]), limits.DOCUMENT_BYTES + 1
            size = min(int(bounds[-1]) - first, most) if count == 1 else int(bounds[-1]) - first
            content = files.read(file, self.data + first, size)
            for number, valid in enumerate(self._valid(files, file, row, row + count)):
                start, end = int(bounds[number]) - first, int(bounds[number + 1]) - first
                yield content[start:end] if valid else None
            row += count

    def _bounds(self, files: OpenFiles, file: File, start: int, stop: int) -> npt.NDArray[Any]:
        width = self.offset_type.itemsize
        content = files.read(file, self.offsets + start * width, (stop - start + 1) * width)
        bounds = np.frombuffer(content, self.offset_type)
        if bounds[0] < 0 or bounds[-1] > self.data_bytes or (np.diff(bounds) < 0).any():
            raise ValueError("the offsets of its texts are not in order")
        return bounds

    def _valid(self, files: OpenFiles, file: File, start: int, stop: int) -> npt.NDArray[np.bool_]:
        if self.validity is None:
            return np.ones(stop - start, bool)
        first = start // 8
        content = np.frombuffer(files.read(file, self.validity + first, (stop + 7) // 8 - first), np.uint8)
        return np.unpackbits(content, bitorder="little")[start - 8 * first : stop - 8 * first].astype(bool)


def _offset_width(kind: Any) -> int:
    """The bytes of an offset of a column that is read in place; 0 for other types."""
    import pyarrow

    if pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind):
        return 4
    return 8 if pyarrow.types.is_large_string(kind) or pyarrow.types.is_large_binary(kind) else 0


def arrow_files(keys: TextKeys) -> tuple[File, ...]:
    """The files of a path, as `find_files`; of a folder of `save_to_disk`, the files that it lists.

    Raises UserError as `find_files`, or if a folder has several splits and none of them is named."""
    assert keys.path is not None
    folder, split = Path(keys.path).expanduser(), ""
    if (folder / OF_SPLITS).is_file():
        split = _split_of(keys, read_json_object(folder / OF_SPLITS, what="list of splits").get("splits"))
        folder /= split
    elif keys.split is not None:
        own = read_json_object(folder / OF_DATA, what="description").get("_split") if folder.is_dir() else None
        if own != keys.split:
            there = f"is of the split {shortened(own, 40)}" if isinstance(own, str) else "has no splits"
            raise UserError(Problem(f"{keys.table}.dataset_split", f"{keys.path} {there}", keys.split, fix="remove it"))
    if (folder / OF_DATA).is_file() and (names := _listed(folder)):
        return describe_files([(folder / name, f"{split}/{name}" if split else name) for name in names], folder)
    return find_files("arrow", str(folder), f"{keys.table}.dataset_path")


def _split_of(keys: TextKeys, splits: object) -> str:
    names = [each for each in splits if isinstance(each, str)] if isinstance(splits, list) else []
    names = [each for each in names if each not in ("", ".", "..") and "/" not in each]
    if keys.split is None and len(names) == 1:
        return names[0]
    if keys.split is None or keys.split not in names:
        what = "the folder has several splits" if keys.split is None else "the folder has no such split"
        close = None if keys.split is None else nearest(keys.split, names)
        where, allowed = f"{keys.table}.dataset_split", format_some(names, 10) or "none"
        fix = "set it to the split that is read" if keys.split is None else None
        raise UserError(Problem(where, what, keys.split, allowed=allowed, nearest=close, fix=fix))
    return keys.split


def _listed(folder: Path) -> list[str]:
    """The Arrow files of a data set; the folder can have others, of the cache of `datasets`."""
    listed = read_json_object(folder / OF_DATA, what="description").get("_data_files")
    names = [each.get("filename") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]
