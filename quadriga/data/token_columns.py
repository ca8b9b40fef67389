"""Columns of token ids in Parquet and Arrow files: of integers, or of lists of integers, where a list is a document."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quadriga.data.files import File
from quadriga.data.sources import MOST_NAMES
from quadriga.data.stored_arrays import path_of
from quadriga.data.token_formats import Documents, TokenFile, TokenOptions, require_dtype
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import format_some

USUAL_NAME = "input_ids"  # of the column, if the user names none
DEFAULT_NAME = "text"  # of `dataset_text_field`, so it is not known whether the user names it
WITHOUT_NULLS = "write the column again without nulls"


class IdColumn(NamedTuple):
    """The column of ids in an Arrow schema. `width`: of a list, its number of values if that is fixed, else 0."""

    position: int
    name: str
    dtype: np.dtype[Any]
    is_list: bool
    width: int


def find_id_column(file: File, schema: Any, options: TokenOptions) -> IdColumn:
    """The column that the user names, else `input_ids`, else the only one that can have ids, else `text`.

    Raises UserError.
    """
    key = f"{options.key}.dataset_text_field"
    columns = {name: _as_column(index, schema.field(index)) for index, name in enumerate(schema.names)}
    fit = [name for name, column in columns.items() if column is not None]
    unnamed = (USUAL_NAME, fit[0] if len(fit) == 1 else DEFAULT_NAME)
    name = options.field or next((each for each in unnamed if each in fit), USUAL_NAME)
    there = format_some([shortened(each, 40) for each in schema.names], MOST_NAMES) or "none"
    fix = f"set {key} to the column of ids" + (f", here perhaps {shortened(fit[0], 40)}" if fit else "")
    if schema.names.count(name) != 1:
        how = "several columns" if name in columns else "no column"
        what = f"the file has {how} `{shortened(name)}`; its columns are {there}"
        raise UserError(Problem(path_of(file), what, fix=fix))
    column = columns[name]
    if column is None:
        what = f"the column `{shortened(name)}` is of type {shortened(schema.field(name).type, 200)}"
        allowed = "a column of integers, or of lists of integers"
        raise UserError(Problem(path_of(file), what, allowed=allowed, fix=fix))
    require_dtype(file, column.dtype, options)
    return column


def _as_column(index: int, field: Any) -> IdColumn | None:
    """None if the type of the field is not one of ids."""
    import pyarrow

    types, kind = pyarrow.types, field.type
    fixed = types.is_fixed_size_list(kind)
    is_list = fixed or types.is_list(kind) or types.is_large_list(kind)
    inner = kind.value_type if is_list else kind
    if not types.is_integer(inner) or (fixed and not kind.list_size):
        return None
    return IdColumn(index, field.name, np.dtype(str(inner)), is_list, kind.list_size if fixed else 0)


class Parts(NamedTuple):
    """The row groups or record batches of a file: by part its first id and its first row, each followed by the sum."""

    ids: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class ColumnFile(TokenFile):
    """A column in parts. A document is a list, and its number is that of its row."""

    def __init__(self, file: File, column: IdColumn, ids: Sequence[int], rows: Sequence[int]) -> None:
        super().__init__(file, sum(ids), column.dtype)
        self.indexed = column.is_list
        self.column = column
        self.parts = Parts(_starts(ids), _starts(rows))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        pieces = [self._values(part, first, last) for part, first, last in self._split(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, self.dtype)])

    def documents(self, start: int, stop: int) -> Documents:
        numbers, ends = [], []
        for part, first, last in self._split(start, stop):
            found = self._lists(part, first, last)
            numbers.append(found.numbers + self.parts.rows[part])
            ends.append(found.ends + self.parts.ids[part])
        return Documents(np.concatenate(numbers), np.concatenate(ends))

    def _split(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Part, first id and id after the last one within it, of each part that has ids of [start, stop)."""
        starts = self.parts.ids
        part = int(np.searchsorted(starts, start, side="right")) - 1
        found = []
        while start < stop:
            end = min(stop, int(starts[part + 1]))
            if start < end:
                found.append((part, start - int(starts[part]), end - int(starts[part])))
            start, part = end, part + 1
        return found

    @abstractmethod
    def _values(self, part: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Ids [start, stop) of a part. Raises UserError."""

    @abstractmethod
    def _lists(self, part: int, start: int, stop: int) -> Documents:
        """The lists of ids [start, stop) of a part; numbers and ends count from its beginning. Raises UserError."""


def _starts(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(list(accumulate(counts, initial=0)), np.int64)
