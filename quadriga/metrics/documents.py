"""Which documents each step read: `documents/rankN.jsonl` in the run folder (`metrics.log_documents`).

One JSON object a line and step: {"step": 7, "attempt": 1, "rows": {"0": ["0:12:3", "0:12:9"], "1": [...]}}. Rows are
those of the global batch. A document goes by `epoch:shard:number`: the pass over the data, the shard of the source, and
the record in it (a byte offset in text and JSON lines, a row in Parquet and on the Hub). The same documents have the
same names on every layout, number of ranks and attempt; two runs can be compared if their data, seed and global batch
are the same. A document that goes on in the next window is named by both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quadriga.metrics.jsonl import JsonLines, records_of

DOCUMENTS_FOLDER = "documents"

Ids = Sequence[tuple[int, int, int]]  # of one row


class DocumentLog:
    """Writes the documents of one rank's rows; its lines outlive a kill of the process."""

    def __init__(self, folder: str | os.PathLike[str], *, rank: int, attempt: int, first_row: int) -> None:
        """`folder` is that of the run. To be made by one rank of those that read the same rows."""
        self._lines = JsonLines(Path(folder, DOCUMENTS_FOLDER, f"rank{rank}.jsonl"))
        self._attempt, self._first_row = attempt, first_row

    def write(self, step: int, rows: Sequence[Ids]) -> None:
        """`rows`: the documents of each row of this rank's share of the step's batch."""
        self._lines.write({"step": step, "attempt": self._attempt, "rows": shown(rows, self._first_row)})

    def close(self) -> None:
        self._lines.close()


def shown(rows: Sequence[Ids], first_row: int) -> dict[str, list[str]]:
    """The names of the documents by row of the global batch."""
    return {
        str(row): [f"{epoch}:{shard}:{number}" for epoch, shard, number in ids]
        for row, ids in enumerate(rows, start=first_row)
    }


def read_documents(folder: str | os.PathLike[str]) -> dict[int, dict[int, list[str]]]:
    """The documents of every step by row, of all ranks of a run: {step: {row: [name, ...]}}, both ascending.

    Where an attempt began again, what older attempts read from there on is left out, for that was given up. Raises
    ValueError naming the line where a line is none of ours.
    """
    files = sorted(Path(folder, DOCUMENTS_FOLDER).glob("rank*.jsonl"))
    lines = [line for file in files for line in records_of(file)]
    kept: dict[int, dict[int, list[str]]] = {}
    for attempt in sorted({line["attempt"] for line in lines}):
        own = [line for line in lines if line["attempt"] == attempt]
        began = min(line["step"] for line in own)
        kept = {step: rows for step, rows in kept.items() if step < began}
        for line in own:
            rows = kept.setdefault(line["step"], {})
            rows.update({int(row): names for row, names in line["rows"].items()})
    return {step: dict(sorted(kept[step].items())) for step in sorted(kept)}
