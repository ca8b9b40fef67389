"""The bounded reading that the other readers stand on."""

from __future__ import annotations

import json
from pathlib import Path

from fuzzing import Reader

from quadriga.reading import parse_json, read_json_object, read_lines

SOUND = {"step": 3, "name": "a", "list": [1, 2.5, None, {"deep": [True]}], "text": "\u00e9"}


def build_json(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(SOUND), encoding="utf-8")


def read_json(folder: Path) -> None:
    read_json_object(folder / "a.json")


def build_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({**SOUND, "step": n}) + "\n" for n in range(20)))


def read_json_lines(folder: Path) -> None:
    for number, line in read_lines(folder / "a.jsonl"):
        parse_json(line, f"a.jsonl, line {number}", nan=True)


READERS = [Reader("json", build_json, read_json), Reader("json lines", build_lines, read_json_lines)]
