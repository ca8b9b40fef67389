"""Data sets streamed from the Hugging Face Hub with `datasets`; nothing is stored on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quadriga.config.schema import TextKeys
from quadriga.data.columns import ROWS_AT_ONCE, cells_of, document_of_cells
from quadriga.data.sources import (
    Document,
    Record,
    SourceWithoutFiles,
    field_fix,
    fingerprint_suffix,
    format_names,
    require_library,
    template_of,
)
from quadriga.errors import Fault, Problem, UserError, shortened
from quadriga.log import logger


class HubSource(SourceWithoutFiles):
    """A shard is a file of the repository. Rows are read in file order; a resume reads its shard from the beginning."""

    def __init__(
        self,
        path: str,
        name: str | None,
        split: str,
        data_files: Sequence[str] | None = None,
        *,
        keys: TextKeys,
    ) -> None:
        self._name = "/".join(part for part in (path, name, split) if part)
        self.keys, self.template = keys, template_of(keys)
        logger.info("data: opening %s on the Hub", self._name)  # without a network, this takes half a minute
        rows = _stream(path, name, split, data_files)
        names = rows.column_names  # None if only the files contain them
        if names is not None:
            self._refuse_if_missing(list(names))
            rows = rows.select_columns(list(dict.fromkeys(self.template.names)))
        self._rows = rows.with_format("arrow")
        self.shards = int(self._rows.num_shards)
        self.fingerprint = f"hub:{self._name}:{self.shards}{fingerprint_suffix(keys)}"

    def read(self, shard: int) -> Iterator[Record]:
        row = 0
        try:
            for table in self._rows.shard(self.shards, shard).iter(ROWS_AT_ONCE):
                self._refuse_if_missing(table.column_names)
                for cells in cells_of(table, self.template):
                    yield Record(shard, row, cells)
                    row += 1
        except UserError:
            raise
        except Exception as error:
            reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
            what = f"streaming {self._name} stopped in shard {shard} after row {row}: {reason}"
            raise Fault(f"{what}. Checkpoints are unchanged; start again to resume from the last one") from error

    def parse(self, record: Record) -> Document:
        return document_of_cells(self, record, self.template)

    def format_location(self, shard: int, number: int) -> str:
        return f"{self._name}, shard {shard}, row {number + 1}"

    def _refuse_if_missing(self, names: Sequence[str]) -> None:
        if missing := [name for name in self.template.names if name not in names]:
            what = f"the data set has no column `{missing[0]}`; its columns are {format_names(names)}"
            raise UserError(Problem(f"dataset {self._name}", what, fix=field_fix(self.keys, names)))


def _stream(path: str, name: str | None, split: str, data_files: Sequence[str] | None) -> Any:
    require_library("datasets", f"dataset {path}", "a data set on the Hub")
    import datasets

    try:
        files = list(data_files) if data_files is not None else None
        return datasets.load_dataset(path, name, split=split, data_files=files, streaming=True)
    except Exception as error:
        first_line = shortened((str(error).strip() or type(error).__name__).split("\n")[0], 300)
        raise UserError(
            Problem(
                f"dataset {path}",
                f"cannot be streamed from the Hub: {first_line}",
                fix=(
                    "check the network (HF_ENDPOINT names a mirror) and, for a gated data set, accept its license and "
                    "set HF_TOKEN; or set dataset_path to a folder of its *.json.gz shards; "
                    "or train on dataset builtin, which needs no download"
                ),
            )
        ) from error
