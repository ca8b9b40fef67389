"""Folders of data that a command has not finished. A run on one would train on a part of the data."""

from __future__ import annotations

from pathlib import Path

from quadriga.errors import Problem, UserError, shortened

WORK = ".tokenize"  # the folder of a `quadriga tokenize` that is not finished
FETCH = ".fetch"  # the folder of `quadriga data fetch`, which keeps its manifest there
INCOMPLETE = "incomplete"  # a file in it while files are missing


def refuse_unfinished(folder: Path) -> None:
    """Raises UserError if a command has begun to fill the folder, and has not ended."""
    where = shortened(folder, 400)
    if (folder / WORK).is_dir() and not (folder / "manifest.json").is_file():
        what = "the shards in this folder are not complete"
        raise UserError(Problem(where, what, fix="run the same `quadriga tokenize` again"))
    if (folder / FETCH / INCOMPLETE).is_file():
        what = "the files in this folder are not complete"
        raise UserError(Problem(where, what, fix="run the same `quadriga data fetch` again"))
