"""Datasets by name: opens what `training.dataset` and `training.dataset_path` select."""

from __future__ import annotations

from quadriga.config.assets import HUB, dataset_problem, is_remote
from quadriga.config.schema import TextKeys
from quadriga.data.arrow_text import ArrowTextSource, arrow_files
from quadriga.data.builtin import BuiltinSource
from quadriga.data.files import c4_files, find_files
from quadriga.data.hub import HubSource, open_hub
from quadriga.data.jsonl import JsonlSource
from quadriga.data.parquet import ParquetSource
from quadriga.data.remote_files import find_remote_files
from quadriga.data.sources import Source
from quadriga.data.text import TextSource
from quadriga.errors import UserError

C4_SPLITS = {"c4": "train", "c4_validation": "validation"}


def open_source(keys: TextKeys, *, streams: int = 1) -> Source:
    """Opens the source that the keys name.

    `streams`: the number of streams that share it. Files with random access are cut into enough shards for all.
    Raises UserError: an unknown name, no file at the path, a format that cannot be read.
    """
    dataset, path, path_key = keys.dataset, keys.path, f"{keys.table}.dataset_path"
    if (problem := dataset_problem(f"{keys.table}.dataset", dataset, path, None)) is not None:
        raise UserError(problem)
    if path is None:
        if dataset in C4_SPLITS:
            return HubSource("allenai/c4", "en", C4_SPLITS[dataset], keys=keys)
        return BuiltinSource(held_out=dataset == "builtin_validation")
    if dataset in C4_SPLITS:
        return JsonlSource(c4_files(path, C4_SPLITS[dataset], path_key), keys)
    if dataset == HUB:
        return open_hub(keys, streams)
    if dataset == "arrow":
        return ArrowTextSource(arrow_files(keys), keys)
    find = find_remote_files if is_remote(path) else find_files
    files = find(dataset, path, path_key)
    if dataset == "text":
        return TextSource(files, streams=streams)
    if dataset == "jsonl":
        return JsonlSource(files, keys, streams=streams)
    return ParquetSource(files, keys)
