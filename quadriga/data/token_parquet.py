"""Columns of token ids in Parquet files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.data.files import File
from quadriga.data.parquet import damaged_parquet, open_parquet
from quadriga.data.stalls import being_read
from quadriga.data.stored_arrays import LoadedArray, path_of, read_repeatedly
from quadriga.data.token_columns import WITHOUT_NULLS, ColumnFile, IdColumn, find_id_column
from quadriga.data.token_formats import Documents, TokenFile, TokenOptions, documents_between
from quadriga.errors import Problem, UserError, shortened


class DecodedGroups:
    """Decoded row groups, the least recently used of which are dropped beyond `most` bytes; the newest one is kept.

    `decoding`: held while a row group is decoded, so that memory does not grow with the number of threads."""

    def __init__(self, most: int = limits.TOKEN_CACHE_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._kept: OrderedDict[tuple[File, int], tuple[npt.NDArray[Any], LoadedArray]] = OrderedDict()
        self._lock, self.decoding = threading.Lock(), threading.Lock()

    def get(self, file: File, part: int) -> tuple[npt.NDArray[Any], LoadedArray] | None:
        with self._lock:
            if (known := self._kept.get((file, part))) is not None:
                self._kept.move_to_end((file, part))
            return known

    def put(self, file: File, part: int, decoded: tuple[npt.NDArray[Any], LoadedArray]) -> None:
        with self._lock:
            if (file, part) not in self._kept:
                self._kept[file, part] = decoded
                self._bytes += _size(decoded)
            while self._bytes > self._most and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(decoded: tuple[npt.NDArray[Any], LoadedArray]) -> int:
    return int(decoded[0].nbytes + decoded[1].values.nbytes)


class ParquetColumn(ColumnFile):
    """A part is a row group, which is decoded whole, because pages cannot be read alone."""

    def __init__(
        self, decoded: DecodedGroups, file: File, column: IdColumn, ids: Sequence[int], rows: Sequence[int]
    ) -> None:
        super().__init__(file, column, ids, rows)
        self._decoded = decoded

    def _values(self, part: int, start: int, stop: int) -> npt.NDArray[Any]:
        return self._decode(part)[0][start:stop]

    def _lists(self, part: int, start: int, stop: int) -> Documents:
        return documents_between(self._decode(part)[1], start, stop)

    def _decode(self, part: int) -> tuple[npt.NDArray[Any], LoadedArray]:
        """Ids of a row group, and the first id of each list, followed by the number of ids."""
        if (known := self._decoded.get(self.file, part)) is not None:
            return known
        with self._decoded.decoding:  # another thread may have decoded it meanwhile
            return self._decoded.get(self.file, part) or self._decode_now(part)

    def _decode_now(self, part: int) -> tuple[npt.NDArray[Any], LoadedArray]:
        where = f", row group {part}"
        try:
            column = read_repeatedly(self.file, lambda: self._read_group(part)).column(0).combine_chunks()
            values = column.flatten() if self.indexed else column
            nulls = column.null_count + (values.null_count if self.indexed else 0)
            bounds = self._bounds(column) if self.indexed else np.empty(0, np.int64)
            ids = values.to_numpy(zero_copy_only=False)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds of errors for damaged files
            raise UserError(damaged_parquet(self.file, error, where)) from error
        expected = int(self.parts.ids[part + 1] - self.parts.ids[part])
        if nulls:
            what = f"the column `{shortened(self.column.name)}` has {nulls:,} nulls"
            raise UserError(Problem(path_of(self.file) + where, what, allowed="integers", fix=WITHOUT_NULLS))
        if len(ids) != expected or ids.dtype != self.dtype:
            reason = ValueError(f"it has {len(ids):,} {ids.dtype} ids; its metadata say {expected:,} {self.dtype} ids")
            raise UserError(damaged_parquet(self.file, reason, where))
        decoded = ids, LoadedArray(bounds)
        self._decoded.put(self.file, part, decoded)
        return decoded

    def _read_group(self, part: int) -> Any:
        with being_read(lambda: path_of(self.file)), open_parquet(self.file) as parquet:
            return parquet.read_row_group(part, columns=[self.column.name], use_threads=False)

    def _bounds(self, column: Any) -> npt.NDArray[np.int64]:
        """The first value of each list, followed by the number of values."""
        if self.column.width:
            return np.arange(len(column) + 1) * self.column.width
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def open_parquet_tokens(decoded: DecodedGroups, file: File, options: TokenOptions) -> TokenFile:
    """Reads the metadata of the file. The number of ids of a row group follows from its statistics."""
    try:
        with read_repeatedly(file, lambda: open_parquet(file)) as parquet:
            column = find_id_column(file, parquet.schema_arrow, options)
            metadata = parquet.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            chunk = sum(_leaves(parquet.schema_arrow.field(index).type) for index in range(column.position))
            rows = [group.num_rows for group in groups]
            ids = [_count(file, group, chunk, column) for group in groups]
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for damaged files
        raise UserError(damaged_parquet(file, error)) from error
    if min([*rows, *ids], default=0) < 0 or sum(rows) > limits.PARQUET_ROWS:
        raise UserError(damaged_parquet(file, ValueError("its number of rows is impossible")))
    if (most := max([*rows, *ids], default=0)) > limits.TOKEN_ROW_GROUP:  # rows without ids take memory too
        what = f"a row group has {most:,} {'ids' if most in ids else 'rows'}; row groups are decoded whole"
        fix = "write it with smaller row groups (row_group_size=1000)"
        allowed = f"at most {limits.TOKEN_ROW_GROUP:,} ids, and as many rows"
        raise UserError(Problem(path_of(file), what, allowed=allowed, fix=fix))
    return ParquetColumn(decoded, file, column, ids, rows)


def _leaves(kind: Any) -> int:
    """The columns of the file that a column of this type is stored in. They are counted, because their paths are
    ambiguous: a name can contain points, as paths do."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _leaves(kind.storage_type)
    return sum(_leaves(kind.field(index).type) for index in range(kind.num_fields)) or 1


def _count(file: File, group: Any, leaf: int, column: IdColumn) -> int:
    """The ids of a row group."""
    if not column.is_list:
        return int(group.num_rows)
    chunk = group.column(leaf)
    statistics = chunk.statistics
    if statistics is None or not statistics.has_null_count:
        what = f"the column `{shortened(column.name)}` has no statistics, from which the number of ids follows"
        raise UserError(Problem(path_of(file), what, fix="write it again with statistics, as pyarrow does by default"))
    return int(chunk.num_values - statistics.null_count)  # an empty list has one entry, which is null
