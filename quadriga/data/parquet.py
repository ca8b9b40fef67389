"""Parquet files: one row a document, in a string column `text`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quadriga.data.files import File, fingerprint
from quadriga.data.sources import Document, Record
from quadriga.errors import Problem, UserError

ROWS_AT_ONCE = 256


class ParquetSource:
    """A shard is a row group, which can be read without the rest of its file."""

    trusted = False

    def __init__(self, files: Sequence[File]) -> None:
        self.files = files
        self.disk_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint("parquet", files)
        self._groups: list[tuple[int, int, int]] = []  # file, row group, its first row
        problems: list[Problem] = []
        for index, file in enumerate(files):
            groups, problem = _row_groups(file)
            problems += [problem] if problem else []
            self._groups += [(index, group, first_row) for group, first_row in enumerate(groups)]
        if problems:
            raise UserError(*problems)
        self.shards = len(self._groups)

    def read(self, shard: int) -> Iterator[Record]:
        import pyarrow
        import pyarrow.parquet

        index, group, row = self._groups[shard]
        path = self.files[index].path
        try:
            with pyarrow.parquet.ParquetFile(path) as parquet:
                for rows in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["text"], use_threads=False):
                    for text in rows.column(0).to_pylist():
                        yield Record(shard, row, text)
                        row += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(_damaged(path, error, f", after row {row}")) from error

    def parse(self, record: Record) -> Document:
        if isinstance(record.data, str):
            return Document(record.data)
        path = self.files[self._groups[record.shard][0]].path
        raise UserError(Problem(f"{path}, row {record.number + 1}", "`text` is null", allowed="a string in every row"))


def _row_groups(file: File) -> tuple[list[int], Problem | None]:
    """The first row of every row group; or what is wrong with the file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (pyarrow.ArrowInvalid, OSError) as error:
        return [], _damaged(file.path, error)
    if "text" not in schema.names:
        what = f"the file has no column `text`; its columns are {', '.join(schema.names[:8])}"
        return [], Problem(str(file.path), what, allowed="one row a document, in a string column `text`")
    kind = schema.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return [], Problem(str(file.path), f"the column `text` is of type {kind}", allowed="string")
    firsts, row = [], 0
    for group in range(metadata.num_row_groups):
        firsts.append(row)
        row += metadata.row_group(group).num_rows
    return firsts, None


def _damaged(path: object, error: Exception, where: str = "") -> Problem:
    return Problem(f"{path}{where}", f"not a readable Parquet file: {error}", fix="fetch or write the file again")
