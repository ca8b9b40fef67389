"""The data sets of torchtitan by name: `c4`, `c4_validation`, and `c4_test`, which is in its repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quadriga.config.assets import data_files
from quadriga.config.keys import format_toml

NAMES = ("c4", "c4_test", "c4_validation")  # in any case
TEST_DATA = "tests/assets/c4_test"  # relative to the directory that a run is started from
SHUFFLE, OVERLAP = "training.dataloader.shuffle", "training.dataloader.window_overlap"


def resolve_datasets(raw: dict[str, Any], origin: dict[str, str]) -> Iterator[str]:
    """Replace torchtitan's names in `raw` (values by key, set by `origin`) by Quadriga's. Yields the notices."""
    for table in ("training", "validation"):
        key = f"{table}.dataset"
        name = raw.get(key)
        if not isinstance(name, str) or name.lower() not in NAMES:
            continue
        raw[key] = name.lower()
        if raw[key] == "c4_test":
            yield _resolve_test_data(table, name, raw, origin)
        if table == "training" and raw[key] != "builtin":
            yield from _data_order_notices(raw)


def _data_order_notices(raw: dict[str, Any]) -> Iterator[str]:
    """One notice if the order of documents or the windows differ from torchtitan's by default.

    There is none for a file with `shuffle = true`, which chooses other batches.
    """
    overlap = raw.get(OVERLAP, 1)
    windows = "each token is a label once" if overlap else "windows do not overlap"
    if SHUFFLE not in raw:
        yield (
            f"{SHUFFLE} is true and {OVERLAP} {format_toml(overlap)}: documents are shuffled, and {windows}; for "
            "torchtitan's batches, set shuffle = false and window_overlap = 0 in [training.dataloader]"
        )
    elif raw[SHUFFLE] is False and OVERLAP not in raw:
        yield (
            f"{OVERLAP} is {format_toml(overlap)}: windows share a token, so that {windows}; for torchtitan's batches, "
            "set window_overlap = 0 in [training.dataloader]"
        )


def _resolve_test_data(table: str, name: str, raw: dict[str, Any], origin: dict[str, str]) -> str:
    """Read `c4_test` from its path or its default place, or the built-in corpus if neither exists."""
    key, path = f"{table}.dataset", f"{table}.dataset_path"
    where = ""
    if raw.get(path) is None and Path(TEST_DATA).is_dir():
        raw[path], origin[path] = TEST_DATA, origin[key]
        where = f" in {TEST_DATA}"
    folder = raw.get(path)
    parquet = isinstance(folder, str) and not data_files("jsonl", folder) and bool(data_files("parquet", folder))
    builtin = "builtin" if table == "training" else "builtin_validation"
    raw[key] = builtin if folder is None else "parquet" if parquet else "jsonl"
    if folder is None:
        where = f", because {TEST_DATA} does not exist {_start_folder_hint()}, or set {path}"
    return f"{key} = {format_toml(name)} [{origin[key]}] is read as {format_toml(raw[key])}{where}"


def missing_tokenizer() -> str:
    """Why torchtitan's test tokenizer is read as another one."""
    return f", because no tokenizer exists there {_start_folder_hint()}, or name another folder"


def _start_folder_hint() -> str:
    return f"(relative to {format_toml(str(Path.cwd()))}): start in torchtitan's folder"
