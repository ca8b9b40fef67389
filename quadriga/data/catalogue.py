"""Datasets by name: opens what `training.dataset` and `training.dataset_path` select."""

from __future__ import annotations

from quadriga.config.assets import dataset_problem
from quadriga.data.builtin import BuiltinSource
from quadriga.data.files import c4_files, find_files
from quadriga.data.hub import HubSource
from quadriga.data.jsonl import JsonlSource
from quadriga.data.parquet import ParquetSource
from quadriga.data.sources import TEXT, Field, Source
from quadriga.data.text import TextSource
from quadriga.errors import UserError

C4_SPLITS = {"c4": "train", "c4_validation": "validation"}


def open_source(dataset: str, dataset_path: str | None = None, *, streams: int = 1, field: Field = TEXT) -> Source:
    """Opens the source that `training.dataset` names.

    `streams`: the number of streams that share it. Files with random access are cut into enough shards for all.
    `field`: the field of a record that is the document, in JSON lines, Parquet and data of the Hub.
    Raises UserError: an unknown name, no file at the path, a format that cannot be read.
    """
    if (problem := dataset_problem(field.path_key.removesuffix("_path"), dataset, dataset_path, None)) is not None:
        raise UserError(problem)
    if dataset_path is None:
        if dataset in C4_SPLITS:
            return HubSource("allenai/c4", "en", C4_SPLITS[dataset], field=field)
        return BuiltinSource(held_out=dataset == "builtin_validation")
    if dataset in C4_SPLITS:
        return JsonlSource(c4_files(dataset_path, C4_SPLITS[dataset], field.path_key), field=field)
    files = find_files(dataset, dataset_path, field.path_key)
    if dataset == "text":
        return TextSource(files, streams=streams)
    if dataset == "jsonl":
        return JsonlSource(files, streams=streams, field=field)
    return ParquetSource(files, field=field)
