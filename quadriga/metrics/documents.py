"""Which documents each step read: `documents/rankN.jsonl` in the run folder (`metrics.log_documents`).

One JSON object a line and step: {"step": 7, "attempt": 1, "rows": {"0": ["0:12:3", "0:12:9"], "1": [...]}}. Rows are
those of the global batch. A document goes by `epoch:shard:number`: the pass over the data, the shard of the source, and
the record in it (a byte offset in text and JSON lines, a row in Parquet and on the Hub). The same documents have the
same names on every layout, number of ranks and attempt; two runs can be compared if their data, seed and global batch
are the same. A document that goes on in the next window is named by both.
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

Ids = Sequence[tuple[int, int, int]]  # of one row


class DocumentLog:
    """Writes the documents of one rank's rows; its lines outlive a kill of the process."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int,
        attempt: int,
        first_row: int,
        failures: WriteFailures | None = None,
    ) -> None:
        """`folder` is that of the run. To be made by one rank of those that read the same rows."""
        path = Path(folder, DOCUMENTS_FOLDER, f"rank{rank}.jsonl")
        self._lines = Guarded(lambda: JsonLines(path), str(path), failures or WriteFailures(stops=False))
        self._attempt, self._first_row = attempt, first_row

    def write(self, step: int, rows: Sequence[Ids]) -> None:
        """`rows`: the documents of each row of this rank's share of the step's batch."""
        self._lines.write({"step": step, "attempt": self._attempt, "rows": format_documents(rows, self._first_row)})

    def close(self) -> None:
        self._lines.close()


def format_documents(rows: Sequence[Ids], first_row: int) -> dict[str, list[str]]:
    """The names of the documents by row of the global batch."""
    return {
        str(row): [f"{epoch}:{shard}:{number}" for epoch, shard, number in ids]
        for row, ids in enumerate(rows, start=first_row)
    }


def read_documents(folder: str | os.PathLike[str]) -> dict[int, dict[int, list[str]]]:
    """The documents of every step by row, of all ranks of a run: {step: {row: [name, ...]}}, both ascending.

    Where an attempt began again, what older attempts read from there on is left out, for that was given up.

    Raises:
        UserError: a file cannot be read, or a line is none of ours; the message names both.
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
    """Attempt, step and rows of each line but for a last one that a kill has torn."""
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
