"""The data sets of torchtitan by name: `c4`, `c4_validation`, and `c4_test`, which lies in its repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quadriga.config.assets import data_files
from quadriga.config.keys import show

NAMES = ("c4", "c4_test", "c4_validation")  # in any case
TEST_DATA = "tests/assets/c4_test"  # in the folder that a run is started from
SHUFFLE, OVERLAP = "training.dataloader.shuffle", "training.dataloader.window_overlap"


def read_as(said: dict[str, Any], origin: dict[str, str]) -> Iterator[str]:
    """Put into `said` (values by key, from `origin`) what their names mean here; what is to be said of it."""
    for table in ("training", "validation"):
        key = f"{table}.dataset"
        name = said.get(key)
        if not isinstance(name, str) or name.lower() not in NAMES:
            continue
        said[key] = name.lower()
        if said[key] == "c4_test":
            yield _test_data(table, name, said, origin)
        if table == "training" and said[key] != "builtin":
            yield from _order(said)


def _order(said: dict[str, Any]) -> Iterator[str]:
    """One line where the order of documents or the windows are others than torchtitan's, and nothing is said of them.

    Nothing is said to a file that has `shuffle = true`: it has chosen other batches."""
    overlap = said.get(OVERLAP, 1)
    windows = "each token is a label once" if overlap else "windows do not overlap"
    if SHUFFLE not in said:
        yield (
            f"{SHUFFLE} is true and {OVERLAP} {show(overlap)}: documents are mixed, and {windows}; torchtitan's "
            "batches: shuffle = false and window_overlap = 0 in [training.dataloader]"
        )
    elif said[SHUFFLE] is False and OVERLAP not in said:
        yield (
            f"{OVERLAP} is {show(overlap)}: windows share a token, so that {windows}; torchtitan's batches: "
            "window_overlap = 0 in [training.dataloader]"
        )


def _test_data(table: str, name: str, said: dict[str, Any], origin: dict[str, str]) -> str:
    """Read `c4_test` where its path says, or in its own place; the built-in corpus where nothing is there."""
    key, path = f"{table}.dataset", f"{table}.dataset_path"
    shown = ""
    if said.get(path) is None and Path(TEST_DATA).is_dir():
        said[path], origin[path] = TEST_DATA, origin[key]
        shown = f" in {TEST_DATA}"
    folder = said.get(path)
    parquet = isinstance(folder, str) and not data_files("jsonl", folder) and bool(data_files("parquet", folder))
    builtin = "builtin" if table == "training" else "builtin_validation"
    said[key] = builtin if folder is None else "parquet" if parquet else "jsonl"
    if folder is None:
        shown = f", since {TEST_DATA} is not there {_start_elsewhere()}, or name {path}"
    return f"{key} = {show(name)} [{origin[key]}] is read as {show(said[key])}{shown}"


def no_tokenizer() -> str:
    """Why the tokenizer of its tests is not the one that a file names."""
    return f", since no tokenizer is there {_start_elsewhere()}, or name another folder"


def _start_elsewhere() -> str:
    return f"(looked for from {show(str(Path.cwd()))}): start in torchtitan's folder"
