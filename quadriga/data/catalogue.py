"""Datasets by name: opens what `training.dataset` and `training.dataset_path` select."""

from __future__ import annotations

from quadriga.data.builtin import BuiltinSource
from quadriga.data.files import c4_files, find_files
from quadriga.data.hub import HubSource
from quadriga.data.jsonl import JsonlSource
from quadriga.data.parquet import ParquetSource
from quadriga.data.sources import TEXT, Field, Source
from quadriga.data.text import TextSource
from quadriga.errors import Problem, UserError, nearest

HUB_DATASETS = {"c4": "train", "c4_validation": "validation"}
BUILTIN_DATASETS = {"builtin": False, "builtin_validation": True}  # name: is it the held-out part?
LOCAL_DATASETS = ("text", "jsonl", "parquet")


def open_source(dataset: str, dataset_path: str | None = None, *, streams: int = 1, field: Field = TEXT) -> Source:
    """Opens the source that `training.dataset` names.

    `streams`: the number of streams that share it. Files with random access are cut into enough shards for all.
    `field`: the field of a record that is the document, in JSON lines, Parquet and data of the Hub.
    Raises UserError: an unknown name, no file at the path, a format that cannot be read.
    """
    if dataset in BUILTIN_DATASETS:
        _refuse_path(dataset, dataset_path)
        return BuiltinSource(held_out=BUILTIN_DATASETS[dataset])
    if dataset in HUB_DATASETS:
        return _open_c4(dataset, dataset_path, field)
    if dataset not in LOCAL_DATASETS:
        known = (*HUB_DATASETS, *BUILTIN_DATASETS, *LOCAL_DATASETS)
        what = "there is no such dataset"
        raise UserError(
            Problem("dataset", what, value=dataset, allowed=", ".join(known), nearest=nearest(dataset, known))
        )
    return _open_local(dataset, dataset_path, streams, field)


def _refuse_path(dataset: str, dataset_path: str | None) -> None:
    if dataset_path is not None:
        what = f"dataset {dataset} is built in and reads no file"
        raise UserError(
            Problem("dataset_path", what, value=dataset_path, fix="remove it, or set dataset to text or jsonl")
        )


def _open_c4(dataset: str, dataset_path: str | None, field: Field) -> Source:
    if dataset_path is None:
        return HubSource("allenai/c4", "en", HUB_DATASETS[dataset], field=field)
    return JsonlSource(c4_files(dataset_path, HUB_DATASETS[dataset]), field=field)


def _open_local(dataset: str, dataset_path: str | None, streams: int, field: Field) -> Source:
    if dataset_path is None:
        fix = "set dataset_path to a file, a folder or a glob"
        raise UserError(Problem("dataset_path", f"dataset {dataset} needs a path", fix=fix))
    files = find_files(dataset, dataset_path)
    if dataset == "text":
        return TextSource(files, streams=streams)
    if dataset == "jsonl":
        return JsonlSource(files, streams=streams, field=field)
    return ParquetSource(files, field=field)
