"""`metrics.jsonl`: one JSON object a line, appended as the run goes, whole again after any kill.

Each start begins with a record of kind `backends`: which backend carries the bytes of which axis. After a resume, steps
that are replayed appear again with a higher `attempt`; `read_metrics` keeps the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
TAIL = 1 << 16  # more than the longest line


class JsonLines:
    """Appends records to a file. A last line that a kill tore is cut when the file is opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line reaches the system when it is whole

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline of a file, if there is a file and it does not end in one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - TAIL, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def read_metrics(path: str | os.PathLike[str], kind: str = "train") -> list[Record]:
    """The records of a run, one a step, by step: where an attempt replayed steps, its records and not the older ones.

    `kind` is "train" or "validation". What an earlier attempt logged beyond the step where a later one began again is
    left out, for that branch of the run was given up. Raises ValueError naming the line where a line is no record.
    """
    newest = 0
    kept: dict[int, Record] = {}
    for record in records_of(Path(path)):
        if record["attempt"] > newest:
            newest = record["attempt"]
            kept = {step: old for step, old in kept.items() if step < record["step"]}
        if record["kind"] == kind:
            kept[record["step"]] = record
    return [kept[step] for step in sorted(kept)]


def next_attempt(path: str | os.PathLike[str]) -> int:
    """The number of the attempt that starts now: one more than the last in the file, 1 where there is none."""
    path = Path(path)
    if not path.exists():
        return 1
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL, 0))
        whole_lines = file.read().split(b"\n")[:-1]
    # Attempts never fall along the file, so the last record knows the highest.
    return 1 + (int(json.loads(whole_lines[-1])["attempt"]) if whole_lines else 0)


def records_of(path: Path) -> Iterator[Record]:
    """Every record of a file of ours, but for a last line that was torn. Raises ValueError naming the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # torn by a kill: the next start cuts it
            try:
                record = json.loads(line)
                yield {"kind": "train", **record, "attempt": int(record["attempt"]), "step": int(record["step"])}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a record of a run ({error})") from error
