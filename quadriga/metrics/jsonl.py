"""`metrics.jsonl`: one JSON object per line, appended during the run. An incomplete last line after a kill is removed.

Each start begins with a record of kind `backends`: the backend of each axis. After a resume, repeated steps appear
again with a higher `attempt`; `read_metrics` keeps the last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from quadriga.errors import UserError
from quadriga.log import logger
from quadriga.metrics.append import Appender, ensure_appendable
from quadriga.metrics.lines import BadLines, checked_lines
from quadriga.reading import parse_json, read_tail
from quadriga.units import plural

Record = dict[str, Any]  # JSON values
TAIL = 1 << 16  # more than the longest line
MAX_ATTEMPT = 10**9  # a larger number is damage


class JsonLines:
    """Appends records to a file, each line completely or not at all. When it opens the file, it removes an incomplete
    last line, and sets aside anything that is not an appendable file. Raises OSError if that or a write fails."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        ensure_appendable(self.path)
        cut_torn_line(self.path)
        self._file = Appender(self.path)

    def write(self, record: Record) -> None:
        self._file.write((json.dumps(record) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line of a file, if the file exists. A last line that does not begin like a record is
    not the start of one: it only gets a newline, and readers skip it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        whole = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - TAIL, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.seek(end)
        if end == whole or file.read(1) == b"{":
            file.truncate(end)
        else:
            file.seek(whole)
            file.write(b"\n")


def read_metrics(
    path: str | os.PathLike[str],
    kind: str = "train",
    *,
    required: Collection[str] = (),
    notices: list[str] | None = None,
) -> list[Record]:
    """The records of a run, one per step, by step. If an attempt repeated steps, its records replace the older ones.

    `kind` is "train" or "validation". Validations have one record per step and `set`, in the order of the file. Records
    of an earlier attempt after the first step of a later one are left out, because that branch of the run was
    discarded. If steps or attempts go back within an attempt, as where the files of two runs were joined, the later
    lines count, with a notice. Lines that are no records, or lack one of the `required` fields, are left out and
    reported: in `notices`, or as a warning in the log.

    Raises:
        UserError: the file cannot be read, is no regular file, or is beyond a limit (`quadriga.limits`).
    """
    bad = BadLines(Path(path))
    every: list[tuple[bool, Record]] = []  # whether the record begins an attempt, and the record
    attempt = backwards = 0
    step = -1
    seen: set[str | None] = set()  # the held-out sets with a record of this step
    for record in iter_records(Path(path), {kind: required}, bad):
        goes_back = record["attempt"] < attempt
        if record["attempt"] != attempt:
            step = -1
        if record["kind"] == kind:
            seen = seen if record["step"] == step else set()
            goes_back |= record["step"] < step or _set_of(record) in seen
            seen.add(_set_of(record))
            step = record["step"]
        every.append((goes_back or record["attempt"] > attempt, record))
        attempt, backwards = record["attempt"], backwards + goes_back
    emit_notices(bad, notices)
    if backwards:
        what = (
            "the steps or the starts go back within a start: these may be lines of two runs, and the later ones count"
        )
        _emit(f"{path}: {what} ({plural(backwards, 'place')})", notices)
    kept: dict[tuple[int, str | None], Record] = {}
    limit: float = math.inf  # from this step on a later attempt trained again
    for begins, record in reversed(every):
        if record["kind"] == kind and record["step"] < limit:
            kept.setdefault((record["step"], _set_of(record)), record)
        if begins:
            limit = min(limit, record["step"])
    in_file_order = list(kept.values())
    in_file_order.reverse()
    return sorted(in_file_order, key=lambda record: int(record["step"]))


def _set_of(record: Record) -> str | None:
    """The name of the held-out set; None in other records."""
    name = record.get("set")
    return name if isinstance(name, str) else None


def emit_notices(bad: BadLines, notices: list[str] | None) -> None:
    """Report which lines of a file are left out: in `notices`, or in the log."""
    for notice in bad.notices:
        _emit(notice, notices)


def _emit(notice: str, notices: list[str] | None) -> None:
    if notices is not None:
        notices.append(notice)
    else:
        logger.warning("%s", notice)


def next_attempt(path: str | os.PathLike[str]) -> int:
    """The number of the attempt that starts now: one more than the last in the file, 1 if there is none.

    Lines that are no records do not count. Raises UserError if it is no regular file.
    """
    path = Path(path)
    if not path.exists():
        return 1
    tail = read_tail(path, TAIL)
    # Attempts never decrease along the file, so the last record has the highest.
    for line in reversed(tail.split(b"\n")[:-1]):
        try:
            found = parse_json(line, str(path), nan=True)
        except UserError:
            continue
        attempt = found.get("attempt") if isinstance(found, dict) else None
        if type(attempt) is int and 1 <= attempt < MAX_ATTEMPT:
            return attempt + 1
    return 1


def iter_records(path: Path, required: Mapping[str, Collection[str]], bad: BadLines) -> Iterator[Record]:
    """Every record of `metrics.jsonl`, in the order of the file. `required`: by kind, the fields besides attempt and
    step that a record must have. Lines that are no records are added to `bad`."""
    for number, line in checked_lines(path, ("attempt", "step"), bad):
        record = {"kind": "train", **line}
        lacking = [name for name in required.get(record["kind"], ()) if record.get(name) is None]
        if lacking:
            bad.add(number, f"it lacks {', '.join(sorted(lacking))}")
        elif record["kind"] == "train" and record["step"] < 1:
            bad.add(number, "step is 0, and steps count from 1")
        else:
            yield record
