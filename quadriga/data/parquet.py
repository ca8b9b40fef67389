"""Parquet files: one row per document, in a column of strings or of UTF-8 bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.data.files import Cuts, File, layout_state, saved_cuts
from quadriga.data.recognize import refuse_if_foreign
from quadriga.data.sources import (
    Anchor,
    Document,
    FileSource,
    Record,
    bad_record,
    field_fix,
    format_names,
    require_library,
)
from quadriga.errors import Problem, UserError, shortened

ROWS_AT_ONCE = 256
FOOTERS_AT_ONCE = 16  # files whose metadata is read concurrently
MOST_PROBLEMS = 10


class ParquetSource(FileSource):
    """A shard is a row group, because a row group can be read without the rest of its file."""

    def __init__(self, files: Sequence[File], keys: TextKeys) -> None:
        super().__init__("parquet", files, keys)
        self.keys = keys
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = [pool.submit(_row_groups, file, keys) for file in files]
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
                    ROWS_AT_ONCE, row_groups=list(groups), columns=[self.keys.field], use_threads=False
                )
                for batch in batches:
                    for text in _texts(batch.column(0)):
                        if first <= row < end:
                            yield Record(shard, row, text)
                        row += 1
        except Exception as error:
            raise UserError(damaged_parquet(file, error, f", after row {row}")) from error
        if row < end:
            raise UserError(damaged_parquet(file, ValueError(f"it ends before row {end}"), f", after row {row}"))

    def parse(self, record: Record) -> Document:
        text = record.data
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                what = f"`{self.keys.field}` is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
                raise bad_record(self, record, what, fix="rewrite the column as UTF-8 text") from error
        if text is None:
            raise bad_record(self, record, f"`{self.keys.field}` is null", allowed="a string in every row")
        if len(text) > limits.DOCUMENT_BYTES:
            what = f"the document is longer than the limit of {limits.DOCUMENT_BYTES:,} characters"
            raise bad_record(self, record, what, fix="split the document")
        return Document(text)

    def format_location(self, shard: int, number: int) -> str:
        return f"{shortened(self.file_of(shard).path, 400)}, row {number + 1}"


def _texts(column: Any) -> Iterator[str | bytes | None]:
    """The cells of a column of strings or bytes; bytes if they are not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        # Only the values that these rows use are decoded. `take` raises IndexError for an index outside the dictionary.
        used = column.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _texts(column.dictionary.take(used)), strict=True))
        for index in column.indices.to_pylist():
            yield None if index is None else values[index]
        return
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        yield from column.view(pyarrow.binary_view() if _is_view(column.type) else _raw(column.type)).to_pylist()


def _is_view(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string_view(kind) or pyarrow.types.is_binary_view(kind))


def _raw(kind: Any) -> Any:
    """The type of the same cells as bytes."""
    import pyarrow

    return pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()


def _is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    string = types.is_string(kind) or types.is_large_string(kind)
    return bool(string or types.is_binary(kind) or types.is_large_binary(kind) or _is_view(kind))


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


def _row_groups(file: File, keys: TextKeys) -> list[int]:
    """The first row of every row group, followed by the number of all rows. Raises UserError."""
    where = shortened(file.path, 400)
    try:
        refuse_if_foreign(file, "parquet")
        with open_parquet(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            names = list(schema.names)
            if names.count(keys.field) != 1:
                how = f"{names.count(keys.field) or 'no'} column{'s' * (keys.field in names)}"
                what = f"the file has {how} `{keys.field}`; its columns are {format_names(names)}"
                allowed = f"one row per document, in a string column `{keys.field}`"
                fix = "rename all but one of them" if keys.field in names else field_fix(keys, names)
                raise UserError(Problem(where, what, allowed=allowed, fix=fix))
            kind = schema.field(keys.field).type
            if not _is_text(kind):
                what = f"the column `{keys.field}` is of type {shortened(kind, 200)}"
                others = [name for name in names if _is_text(schema.field(name).type)] if names else []
                allowed = "a column of strings, or of bytes that are UTF-8"
                raise UserError(Problem(where, what, allowed=allowed, fix=field_fix(keys, others)))
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
