"""Parquet files: one row per document, in columns of strings or of UTF-8 bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.config.templates import Template
from quadriga.data.columns import ROWS_AT_ONCE, cells_of, document_of_cells, require_text_columns
from quadriga.data.files import Cuts, File, layout_state, saved_cuts
from quadriga.data.recognize import refuse_if_foreign
from quadriga.data.sources import (
    Anchor,
    Document,
    FileSource,
    Record,
    require_library,
    template_of,
)
from quadriga.errors import Problem, UserError, shortened

FOOTERS_AT_ONCE = 16  # files whose metadata is read concurrently
MOST_PROBLEMS = 10


class ParquetSource(FileSource):
    """A shard is a row group, because a row group can be read without the rest of its file."""

    def __init__(self, files: Sequence[File], keys: TextKeys) -> None:
        super().__init__("parquet", files, keys)
        self.template = template = template_of(keys)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = [pool.submit(_row_groups, file, keys, template) for file in files]
        errors = [error for each in footers if isinstance(error := each.exception(), UserError)]
        if problems := [problem for error in errors for problem in error.problems]:
            raise UserError(*problems[:MOST_PROBLEMS])
        self._starts = [each.result() for each in footers]
        self._cut_rows([starts[:-1] for starts in self._starts])

    def _cut_rows(self, cuts: Cuts) -> None:
        """`cuts`: by file, the first row of each shard: the row groups, or those of the run that saved."""
        self._cuts = cuts
        self._cut(cuts, [starts[-1] for starts in self._starts])

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
            with open_parquet(file) as parquet:
                batches = parquet.iter_batches(
                    ROWS_AT_ONCE,
                    row_groups=list(groups),
                    columns=list(dict.fromkeys(self.template.names)),
                    use_threads=False,
                )
                for batch in batches:
                    for cells in cells_of(batch, self.template):
                        if first <= row < end:
                            yield Record(shard, row, cells)
                        row += 1
        except Exception as error:
            raise UserError(damaged_parquet(file, error, f", after row {row}")) from error
        if row < end:
            raise UserError(damaged_parquet(file, ValueError(f"it ends before row {end}"), f", after row {row}"))

    def parse(self, record: Record) -> Document:
        return document_of_cells(self, record, self.template)

    def format_location(self, shard: int, number: int) -> str:
        return f"{shortened(self.file_of(shard).path, 400)}, row {number + 1}"


def open_parquet(file: File) -> Any:
    """The open file. Memory for metadata is bounded, and the checksums of pages are compared if the file has them."""
    require_library("pyarrow", shortened(file.path, 400), "a Parquet file")
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        file.path,
        page_checksum_verification=True,
        thrift_string_size_limit=limits.PARQUET_FOOTER_BYTES,
        thrift_container_size_limit=limits.PARQUET_FOOTER_BYTES // 64,
    )


def _row_groups(file: File, keys: TextKeys, template: Template) -> list[int]:
    """The first row of every row group, followed by the number of all rows. Raises UserError."""
    where = shortened(file.path, 400)
    try:
        refuse_if_foreign(file, "parquet")
        with open_parquet(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            require_text_columns(where, schema, keys, template)
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for damaged files
        raise UserError(damaged_parquet(file, error)) from error
    if min(rows, default=0) < 0 or sum(rows) > limits.PARQUET_ROWS:
        raise UserError(damaged_parquet(file, ValueError("its number of rows is impossible")))
    return list(accumulate(rows, initial=0))


def damaged_parquet(file: File, error: Exception, where: str = "") -> Problem:
    reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
    fix = "decrypt it first" if "encrypted" in reason.lower() else "download or write the file again"
    return Problem(f"{shortened(file.path, 400)}{where}", f"not a readable Parquet file: {reason}", fix=fix)
