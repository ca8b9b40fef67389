"""Logs the documents that each step read: `documents/rankN.jsonl` in the run folder (`metrics.log_documents`).

Each line is a JSON object for one step: {"step": 7, "attempt": 1, "rows": {"0": ["0:12:3", "0:12:9"], "1": [...]}}.
Rows are rows of the global batch. The name of a document is `epoch:shard:number`: the pass over the data, the shard of
the source, and the record in it (a byte offset in text and JSON lines, a row in Parquet and on the Hub). In a mixture,
it is `source:epoch:shard:number`. Names are the same on every layout, number of ranks and attempt. Two runs can be
compared if their data, seed and global batch are the same. A document that continues in the next window is listed in
both.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quadriga.errors import Problem, UserError
from quadriga.metrics.guarded import Guarded, WriteFailures
from quadriga.metrics.jsonl import JsonLines
from quadriga.reading import parse_json, read_lines

DOCUMENTS_FOLDER = "documents"

Ids = Sequence[tuple[str | int, ...]]  # of each document of a row the parts of its name


class DocumentLog:
    """Writes the documents of one rank's rows. Written lines survive a kill of the process."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int,
        attempt: int,
        first_row: int,
        failures: WriteFailures | None = None,
    ) -> None:
        """`folder`: the run folder. Of the ranks that read the same rows, only one creates a log."""
        path = Path(folder, DOCUMENTS_FOLDER, f"rank{rank}.jsonl")
        self._lines = Guarded(lambda: JsonLines(path), str(path), failures or WriteFailures(stops=False))
        self._attempt, self._first_row = attempt, first_row

    def write(self, step: int, rows: Sequence[Ids]) -> None:
        """`rows`: the documents of each of this rank's rows of the step's batch."""
        self._lines.write({"step": step, "attempt": self._attempt, "rows": format_documents(rows, self._first_row)})

    def close(self) -> None:
        self._lines.close()


def format_documents(rows: Sequence[Ids], first_row: int) -> dict[str, list[str]]:
    """The names of the documents, by row of the global batch."""
    return {str(row): [":".join(map(str, parts)) for parts in ids] for row, ids in enumerate(rows, start=first_row)}


def read_documents(folder: str | os.PathLike[str]) -> dict[int, dict[int, list[str]]]:
    """The documents of every step by row, of all ranks of a run: {step: {row: [name, ...]}}, both ascending.

    Steps of older attempts from the first step of a newer attempt on are left out, because they were discarded.

    Raises:
        UserError: a file cannot be read, or a line has another format; the message names file and line.
    """
    by_attempt: dict[int, list[tuple[int, dict[int, list[str]]]]] = defaultdict(list)
    for file in sorted(Path(folder, DOCUMENTS_FOLDER).glob("rank*.jsonl")):
        for attempt, step, rows in _lines_of(file):
            by_attempt[attempt].append((step, rows))
    kept: dict[int, dict[int, list[str]]] = {}
    for attempt in sorted(by_attempt):
        began = min(step for step, _ in by_attempt[attempt])
        kept = {step: rows for step, rows in kept.items() if step < began}
        for step, rows in by_attempt[attempt]:
            kept.setdefault(step, {}).update(rows)
    return {step: dict(sorted(kept[step].items())) for step in sorted(kept)}


def _lines_of(file: Path) -> Iterator[tuple[int, int, dict[int, list[str]]]]:
    """Attempt, step and rows of each line, except a last line that is incomplete after a kill."""
    for number, raw in read_lines(file, what="log of documents", keep_ends=True):
        if not raw.endswith(b"\n"):
            return
        where = f"{file}, line {number}"
        line = parse_json(raw.strip(), where)
        if not isinstance(line, dict) or not _is_line(line):
            allowed = '{"step": 7, "attempt": 1, "rows": {"0": ["0:12:3"]}}'
            raise UserError(Problem(where, "not a line of a log of documents", allowed=allowed))
        yield line["attempt"], line["step"], {int(row): names for row, names in line["rows"].items()}


def _is_line(line: dict[str, Any]) -> bool:
    rows = line.get("rows")
    named = isinstance(rows, dict) and all(_is_row(row, names) for row, names in rows.items())
    counts = line.get("attempt"), line.get("step")
    return named and all(type(count) is int and 0 <= count < 2**63 for count in counts)


def _is_row(row: str, names: object) -> bool:
    digits = row.isascii() and row.isdecimal() and len(row) < 19
    return digits and isinstance(names, list) and all(isinstance(name, str) for name in names)
