"""Parquet files: one row per document, in columns of strings or of UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.data.byte_files import FileBytes
from quadriga.data.columns import ROWS_AT_ONCE, cells_of, require_text_columns
from quadriga.data.files import File
from quadriga.data.recognize import refuse_if_foreign
from quadriga.data.row_source import RowSource
from quadriga.data.sources import Cell, require_library
from quadriga.data.stored_arrays import path_of
from quadriga.errors import Problem, shortened


class ParquetSource(RowSource):
    """A shard is a row group, because a row group can be read without the rest of its file."""

    def __init__(self, files: Sequence[File], keys: TextKeys) -> None:
        super().__init__("parquet", files, keys)

    def _group_sizes(self, file: File) -> list[int]:
        refuse_if_foreign(file, "parquet")
        with open_parquet(file) as parquet:
            metadata = parquet.metadata
            require_text_columns(path_of(file), parquet.schema_arrow, self.keys, self.template)
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _rows(self, file: File, groups: range) -> Iterator[Cell | tuple[Cell, ...]]:
        columns = list(dict.fromkeys(self.template.names))
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(
                ROWS_AT_ONCE, row_groups=list(groups), columns=columns, use_threads=False
            ):
                yield from cells_of(batch, self.template)

    def _damaged(self, file: File, error: Exception, where: str = "") -> Problem:
        return damaged_parquet(file, error, where)


def open_parquet(file: File) -> Any:
    """The open file. Memory for metadata is bounded, and the checksums of pages are compared if the file has them."""
    require_library("pyarrow", path_of(file), "a Parquet file")
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        FileBytes(file),
        page_checksum_verification=True,
        thrift_string_size_limit=limits.PARQUET_FOOTER_BYTES,
        thrift_container_size_limit=limits.PARQUET_FOOTER_BYTES // 64,
    )


def damaged_parquet(file: File, error: Exception, where: str = "") -> Problem:
    reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
    fix = "decrypt it first" if "encrypted" in reason.lower() else "download or write the file again"
    return Problem(f"{path_of(file)}{where}", f"not a readable Parquet file: {reason}", fix=fix)
