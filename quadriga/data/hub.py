"""Data sets of the Hugging Face Hub with `datasets`: streamed, or downloaded once and read from the disk."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from quadriga.config.schema import TextKeys
from quadriga.data import stored_arrays
from quadriga.data.columns import ROWS_AT_ONCE, cells_of, document_of_cells
from quadriga.data.sources import (
    Cell,
    Document,
    Record,
    Source,
    SourceWithoutFiles,
    field_fix,
    fingerprint_suffix,
    format_names,
    require_library,
    template_of,
)
from quadriga.errors import Fault, Problem, UserError, nearest, shortened
from quadriga.log import logger
from quadriga.units import format_some

LEAST_ROWS = 64  # of a shard of data on the disk
MOST_SHARDS = 1 << 17
REACH = (
    "check the network (HF_ENDPOINT names a mirror) and, for a gated data set, accept its license and set HF_TOKEN; "
    "or {other}; or train on dataset builtin, which needs no download"
)


class HubName(NamedTuple):
    """A split of a data set. `revision`: a branch, tag or commit; None for the newest."""

    repository: str
    revision: str | None
    config: str | None
    split: str

    @property
    def title(self) -> str:
        """For messages and fingerprints."""
        place = f"{self.repository}@{self.revision}" if self.revision else self.repository
        return "/".join(part for part in (place, self.config, self.split) if part)


def hub_name(keys: TextKeys) -> HubName:
    """What the keys name."""
    repository, _, revision = (keys.path or "").partition("@")
    return HubName(repository, revision or None, keys.config, keys.split or "train")


def hub_fingerprint(keys: TextKeys, content: str) -> str:
    """`content`: what identifies the data in addition to their name."""
    kind = "hub" if keys.streaming else "hub-local"
    title = hub_name(keys).title.replace(":", "_").replace(";", "_")
    return f"{kind}:{title}:{content}{fingerprint_suffix(keys)}"


class HubRows(SourceWithoutFiles, ABC):
    """Rows of a data set of `datasets`."""

    shards: int
    fingerprint: str

    def __init__(self, title: str, keys: TextKeys, rows: Any) -> None:
        self._name = title
        self.keys, self.template = keys, template_of(keys)
        names = rows.column_names  # None if only the files contain them
        if names is not None:
            self._refuse_if_missing(list(names))
            rows = rows.select_columns(list(dict.fromkeys(self.template.names)))
        self._rows = rows.with_format("arrow")

    @abstractmethod
    def read(self, shard: int) -> Iterator[Record]:
        """As in `Source`."""

    def parse(self, record: Record) -> Document:
        return document_of_cells(self, record, self.template)

    def format_location(self, shard: int, number: int) -> str:
        return f"{self._name}, shard {shard}, row {number + 1}"

    def _refuse_if_missing(self, names: Sequence[str]) -> None:
        if missing := [name for name in self.template.names if name not in names]:
            what = f"the data set has no column `{missing[0]}`; its columns are {format_names(names)}"
            raise UserError(Problem(f"dataset {self._name}", what, fix=field_fix(self.keys, names)))


class HubSource(HubRows):
    """A shard is a file of the repository. Rows are read in file order; a resume reads its shard from the beginning."""

    def __init__(
        self,
        path: str,
        name: str | None,
        split: str,
        data_files: Sequence[str] | None = None,
        *,
        keys: TextKeys,
        builder: Any = None,
    ) -> None:
        """`builder`: of `datasets`, if the data set was looked up before."""
        title = "/".join(part for part in (path, name, split) if part)
        if builder is None:
            logger.info("data: opening %s on the Hub", title)  # without a network, this takes half a minute
            rows = _stream(path, name, split, data_files)
        else:
            rows = builder.as_streaming_dataset(split=split)
        super().__init__(title, keys, rows)
        self.shards = int(self._rows.num_shards)
        self.fingerprint = f"hub:{self._name}:{self.shards}{fingerprint_suffix(keys)}"
        if builder is not None:
            self.fingerprint = hub_fingerprint(keys, f"{self.shards}:{builder.hash}")

    def read(self, shard: int) -> Iterator[Record]:
        row = failures = 0
        while True:
            before = row
            try:
                for cells in self._cells(shard, row):
                    yield Record(shard, row, cells)
                    row += 1
                return
            except UserError:
                raise
            except Exception as error:
                failures = failures + 1 if row == before else 1
                reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
                what = f"streaming {self._name} stopped in shard {shard} after row {row}: {reason}"
                if failures > len(stored_arrays.PAUSES):
                    advice = "Checkpoints are unchanged; start again to resume from the last one"
                    raise Fault(f"{what}. {advice}") from error
                pause = stored_arrays.PAUSES[failures - 1]
                logger.warning("data: %s; trying again in %g s", what, pause)
                time.sleep(pause)

    def _cells(self, shard: int, start: int) -> Iterator[Cell | tuple[Cell, ...]]:
        """The cells of the rows of a shard from row `start` on."""
        row = 0
        for table in self._rows.shard(self.shards, shard).iter(ROWS_AT_ONCE):
            self._refuse_if_missing(table.column_names)
            if row + table.num_rows > start:
                yield from cells_of(table.slice(max(start - row, 0)), self.template)
            row += table.num_rows


class DownloadedSource(HubRows):
    """A data set in the cache of `datasets`, as Arrow files that are mapped into memory. A shard is a range of rows."""

    def __init__(self, keys: TextKeys, builder: Any, streams: int) -> None:
        named = hub_name(keys)
        super().__init__(named.title, keys, _downloaded(named, builder))
        count = len(self._rows)
        self._step = max(count // (4 * streams), LEAST_ROWS, -(-count // MOST_SHARDS))
        self.shards = max(-(-count // self._step), 1)
        self.fingerprint = hub_fingerprint(keys, f"{count}:{builder.hash}")

    def read(self, shard: int) -> Iterator[Record]:
        start, end = shard * self._step, min((shard + 1) * self._step, len(self._rows))
        for first in range(start, end, ROWS_AT_ONCE):
            table = self._rows[first : min(first + ROWS_AT_ONCE, end)]
            for row, cells in enumerate(cells_of(table, self.template), first):
                yield Record(shard, row, cells)


def open_hub(keys: TextKeys, streams: int) -> Source:
    """The data set that `dataset_path` names. Raises UserError: it cannot be reached, or has no such part."""
    named = hub_name(keys)
    require_library("datasets", f"dataset {named.repository}", "a data set on the Hub")
    logger.info("data: opening %s on the Hub", named.title)
    builder = _builder(named, keys)
    splits = [str(split) for split in (builder.config.data_files or builder.info.splits or ())]
    if splits and named.split.partition("[")[0] not in splits:
        where, close = f"{keys.table}.dataset_split", nearest(named.split, splits)
        what = f"{named.repository} has no such split" if keys.split else f"{named.repository} has no split `train`"
        fix = None if keys.split else f"set {where} to the one that is read"
        raise UserError(Problem(where, what, keys.split, allowed=format_some(splits, 10), nearest=close, fix=fix))
    if not keys.streaming:
        return DownloadedSource(keys, builder, streams)
    if "[" in named.split:
        fix = f"name the whole split, or set {keys.table}.dataset_streaming = false"
        what = "a part of a split cannot be streamed"
        raise UserError(Problem(f"{keys.table}.dataset_split", what, keys.split, fix=fix))
    place = named.title.removesuffix(f"/{named.split}").removesuffix(f"/{named.config}")
    return HubSource(place, named.config, named.split, keys=keys, builder=builder)


def _builder(named: HubName, keys: TextKeys) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(named.repository, named.config, revision=named.revision)
    except Exception as error:
        try:
            configs = list(datasets.get_dataset_config_names(named.repository, revision=named.revision))
        except Exception:  # noqa: BLE001 (the first error counts)
            configs = []
        if configs and named.config not in configs:
            where, close = f"{keys.table}.dataset_config", nearest(named.config or "", configs)
            what = f"{named.repository} has no such configuration"
            what = what if named.config else f"{named.repository} has several configurations"
            fix = None if named.config else "set it to the one that is read"
            there = format_some(configs, 10)
            raise UserError(Problem(where, what, named.config, allowed=there, nearest=close, fix=fix)) from error
        raise _unreachable(named.title, error, "set dataset_path to another data set") from error


def _downloaded(named: HubName, builder: Any) -> Any:
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=named.split)
    except Exception as error:
        raise _unreachable(named.title, error, "free space for its copy (HF_HOME), or stream it") from error


def _stream(path: str, name: str | None, split: str, data_files: Sequence[str] | None) -> Any:
    require_library("datasets", f"dataset {path}", "a data set on the Hub")
    import datasets

    try:
        files = list(data_files) if data_files is not None else None
        return datasets.load_dataset(path, name, split=split, data_files=files, streaming=True)
    except Exception as error:
        raise _unreachable(path, error, "set dataset_path to a folder of its *.json.gz shards") from error


def _unreachable(title: str, error: Exception, other: str) -> UserError:
    first_line = shortened((str(error).strip() or type(error).__name__).split("\n")[0], 300)
    what = f"cannot be streamed from the Hub: {first_line}"
    return UserError(Problem(f"dataset {title}", what, fix=REACH.format(other=other)))
