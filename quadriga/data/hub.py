"""Data sets streamed from the Hugging Face Hub by `datasets`; nothing is stored on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quadriga.data.sources import Document, Record
from quadriga.errors import Problem, UserError
from quadriga.log import logger

ROWS_AT_ONCE = 256


class HubSource:
    """A shard is a file of the repository. Rows are read in the files' own order; a resume reads its shard again."""

    trusted = True
    disk_bytes = 0

    def __init__(self, path: str, name: str | None, split: str, data_files: Sequence[str] | None = None) -> None:
        self._named = "/".join(part for part in (path, name, split) if part)
        logger.info("data: opening %s on the Hub", self._named)  # which, with no network, is tried for half a minute
        self._rows = _stream(path, name, split, data_files).select_columns(["text"]).with_format("arrow")
        self.shards = int(self._rows.num_shards)
        self.fingerprint = f"hub:{self._named}:{self.shards}"

    def read(self, shard: int) -> Iterator[Record]:
        row = 0
        try:
            for table in self._rows.shard(self.shards, shard).iter(ROWS_AT_ONCE):
                for text in table.column("text").to_pylist():
                    yield Record(shard, row, text)
                    row += 1
        except Exception as error:  # of many kinds: the network's, the Hub's, and those of what parses the file
            what = f"streaming {self._named} stopped in shard {shard} after row {row}: {error}"
            raise RuntimeError(f"{what}. Checkpoints are not touched; start again to go on from the last") from error

    def parse(self, record: Record) -> Document:
        if isinstance(record.data, str):
            return Document(record.data)
        where = f"{self._named}, shard {record.shard}, row {record.number + 1}"
        raise UserError(Problem(where, "`text` is not a string", allowed="a string in every row"))


def _stream(path: str, name: str | None, split: str, data_files: Sequence[str] | None) -> Any:
    import datasets

    try:
        files = list(data_files) if data_files is not None else None
        return datasets.load_dataset(path, name, split=split, data_files=files, streaming=True)
    except OSError as error:  # so are all of the Hub's own errors: no network, no such repository, no access
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            Problem(
                f"dataset {path}",
                f"cannot be streamed from the Hub: {first_line}",
                fix=(
                    "check the network (HF_ENDPOINT names a mirror) and, for a gated data set, accept its licence and "
                    "set HF_TOKEN; or set dataset_path to a folder of its *.json.gz shards; "
                    "or train on dataset builtin, which needs no download"
                ),
            )
        ) from error
