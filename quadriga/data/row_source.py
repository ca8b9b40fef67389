"""Sources of files of rows, whose groups of rows are read without the rest of the file: Parquet and Arrow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.data.columns import document_of_cells
from quadriga.data.files import Cuts, File, layout_state, saved_cuts
from quadriga.data.sources import Anchor, Cell, Document, FileSource, Record, template_of
from quadriga.data.stored_arrays import path_of
from quadriga.errors import Problem, UserError

FILES_AT_ONCE = 16  # whose metadata are read concurrently
MOST_PROBLEMS = 10


class RowSource(FileSource, ABC):
    """A shard is a group of rows, or the rows that were one for the run that saved. Subclasses read groups."""

    def __init__(self, kind: str, files: Sequence[File], keys: TextKeys) -> None:
        super().__init__(kind, files, keys)
        self.keys, self.template = keys, template_of(keys)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            opened = [pool.submit(self._starts_of, file) for file in files]
        errors = [error for each in opened if (error := each.exception()) is not None]
        if problems := [problem for error in errors if isinstance(error, UserError) for problem in error.problems]:
            raise UserError(*problems[:MOST_PROBLEMS])
        self._starts = [each.result() for each in opened]
        self._cut_rows([starts[:-1] for starts in self._starts])

    @abstractmethod
    def _group_sizes(self, file: File) -> list[int]:
        """The number of rows of each group. Raises UserError, or any error if the file is damaged."""

    @abstractmethod
    def _rows(self, file: File, groups: range) -> Iterator[Cell | tuple[Cell, ...]]:
        """The cells of each row of some groups (`columns.cells_of`). Raises as `_group_sizes`."""

    @abstractmethod
    def _damaged(self, file: File, error: Exception, where: str = "") -> Problem:
        """The problem of a file that cannot be read, with the reason."""

    def layout(self) -> dict[str, Any]:
        return layout_state(self.files, 0, dict(enumerate(self._cuts)))

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        cuts = saved_cuts(self.files, saved)
        self._cut_rows(
            [[min(first, starts[-1]) for first in firsts] for firsts, starts in zip(cuts, self._starts, strict=True)]
        )

    def read(self, shard: int) -> Iterator[Record]:
        index, first, end = self._spans[shard]
        file, starts = self.files[index], self._starts[index]
        groups = range(max(bisect_right(starts, first) - 1, 0), len(starts) - 1)
        groups = range(groups.start, next((group for group in groups if starts[group] >= end), groups.stop))
        row = starts[groups.start] if groups else first
        try:
            for cells in self._rows(file, groups):
                if first <= row < end:
                    yield Record(shard, row, cells)
                row += 1
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds of errors for damaged files
            raise UserError(self._damaged(file, error, f", after row {row}")) from error
        if row < end:
            reason = ValueError(f"it ends before row {end}")
            raise UserError(self._damaged(file, reason, f", after row {row}"))

    def parse(self, record: Record) -> Document:
        return document_of_cells(self, record, self.template)

    def format_location(self, shard: int, number: int) -> str:
        return f"{path_of(self.file_of(shard))}, row {number + 1}"

    def _cut_rows(self, cuts: Cuts) -> None:
        """`cuts`: by file, the first row of each shard: the groups, or those of the run that saved."""
        self._cuts = cuts
        self._cut(cuts, [starts[-1] for starts in self._starts])

    def _starts_of(self, file: File) -> list[int]:
        """The first row of every group, followed by the number of all rows. Raises UserError."""
        try:
            rows = self._group_sizes(file)
            if min(rows, default=0) < 0 or sum(rows) > limits.PARQUET_ROWS:
                raise ValueError("its number of rows is impossible")
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds of errors for damaged files
            raise UserError(self._damaged(file, error)) from error
        return list(accumulate(rows, initial=0))
