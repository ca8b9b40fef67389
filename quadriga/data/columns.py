"""Columns of text in tables of Arrow, as Parquet files, Arrow files and the Hub give them: strings, or UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.config.templates import Template
from quadriga.data.sources import Cell, Document, Record, Source, bad_record, field_fix, format_names, too_long
from quadriga.errors import Problem, UserError, shortened

ROWS_AT_ONCE = 256


def require_text_columns(where: str, schema: Any, keys: TextKeys, template: Template) -> None:
    """Raises UserError unless the schema has one column of text for each name. `where`: the file or the data set."""
    names = list(schema.names)
    for name in template.names:
        if names.count(name) != 1:
            how = f"{names.count(name) or 'no'} column{'s' * (name in names)}"
            what = f"the file has {how} `{name}`; its columns are {format_names(names)}"
            fix = "rename all but one of them" if name in names else field_fix(keys, names)
            raise UserError(Problem(where, what, allowed=f"one row per document, in a string column `{name}`", fix=fix))
        kind = schema.field(name).type
        if not is_text(kind):
            what = f"the column `{name}` is of type {shortened(kind, 200)}"
            others = [each for each in names if names.count(each) == 1 and is_text(schema.field(each).type)]
            fix = "set the dataset to tokens, if these are token ids" if has_integers(kind) else None
            fix = "; or ".join(each for each in (field_fix(keys, others), fix) if each) or None
            raise UserError(Problem(where, what, allowed="a column of strings, or of bytes that are UTF-8", fix=fix))


def is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    string = types.is_string(kind) or types.is_large_string(kind)
    return bool(string or types.is_binary(kind) or types.is_large_binary(kind) or _is_view(kind))


def has_integers(kind: Any) -> bool:
    """Whether a column of this type can have token ids: integers, or lists of them."""
    import pyarrow

    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(types.is_integer(kind.value_type if is_list else kind))


def cells_of(table: Any, template: Template) -> Iterator[Cell | tuple[Cell, ...]]:
    """The cells of each row of a table or record batch: one of them, or with a template a tuple."""
    columns = [_texts(table.column(table.schema.get_field_index(name))) for name in template.names]
    return columns[0] if template.is_one_field else zip(*columns, strict=True)


def document_of_cells(source: Source, record: Record, template: Template) -> Document:
    """The document of a row. Raises BadRecord if a cell is no text, or if they are too long together."""
    cells = record.data if isinstance(record.data, tuple) else (record.data,)
    texts = [_text_of_cell(source, record, name, cell) for name, cell in zip(template.names, cells, strict=True)]
    if sum(map(len, texts)) > limits.DOCUMENT_BYTES:
        raise too_long(source, record)
    return Document(template.join(texts))


def _text_of_cell(source: Source, record: Record, name: str, cell: Cell) -> str:
    if isinstance(cell, str | bytes) and len(cell) > limits.DOCUMENT_BYTES:
        raise too_long(source, record)
    if isinstance(cell, bytes):
        try:
            return cell.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            what = f"`{name}` is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
            raise bad_record(source, record, what, fix="rewrite the column as UTF-8 text") from error
    if isinstance(cell, str):
        return cell
    what = f"`{name}` is null" if cell is None else f"`{name}` is of type {type(cell).__name__}, not a string"
    raise bad_record(source, record, what, allowed="a string in every row")


def _texts(column: Any) -> Iterator[Cell]:
    """The cells of a column of strings or bytes; bytes if they are not UTF-8. Of other columns, their values."""
    import pyarrow

    if isinstance(column, pyarrow.ChunkedArray):
        for chunk in column.chunks:
            yield from _texts(chunk)
        return
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
