"""The plan of a bench: its settings, the order of its runs, and its record `bench.json`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.analysis.compare.runs import BENCH_FILE, read_bench
from quadriga.errors import Problem, UserError, shortened

FORMAT = "quadriga-bench-1"
VARY = "--vary"


@dataclass(frozen=True)
class SettingChoice:
    """One setting. `number`: from 1. `values`: by key, as text."""

    number: int
    values: Mapping[str, str]

    @property
    def folder(self) -> str:
        return f"setting-{self.number}"

    @property
    def name(self) -> str:
        """`backend=nccl, mode=full`: with the last part of each key, or with whole keys if two last parts are equal."""
        last = [key.rpartition(".")[2] for key in self.values]
        labels = last if len(set(last)) == len(last) else list(self.values)
        return ", ".join(f"{label}={value}" for label, value in zip(labels, self.values.values(), strict=True))


def parse_choices(varied: Sequence[str]) -> list[SettingChoice]:
    """Every combination of `KEY=A,B` texts. Raises UserError if a text has another form."""
    tables: dict[str, list[str]] = {}
    for text in varied:
        key, equals, values = text.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        found = _values(values)
        form = "--vary section.key=VALUE,VALUE (a list as a value in brackets)"
        if not equals or "." not in key:
            raise UserError(Problem(VARY, "does not have the required form", text, allowed=form))
        if key in tables:
            raise UserError(Problem(VARY, f"{key} is varied twice", text, fix="name all its values at once"))
        if len(found) < 2 or len(set(found)) < len(found) or "" in found:
            raise UserError(Problem(VARY, "at least two values are needed, each once", text, allowed=form))
        tables[key] = found
    combined = itertools.product(*tables.values())
    return [
        SettingChoice(number, dict(zip(tables, values, strict=True))) for number, values in enumerate(combined, start=1)
    ]


def _values(text: str) -> list[str]:
    """`a,b` -> a and b. Commas in brackets belong to a list."""
    return [value.strip() for value in re.split(r",(?![^\[]*\])", text)]


def run_order(count: int, rounds: int) -> Iterator[tuple[int, list[int]]]:
    """(round from 1, indices of the `count` settings in the order of their runs). Each setting is first in turn."""
    for number in range(rounds):
        first = number % count
        yield number + 1, [(first + place) % count for place in range(count)]


def bench_record(choices: Sequence[SettingChoice], file: str, arguments: Sequence[str], ranks: int) -> dict[str, Any]:
    """The content of `bench.json`. `arguments`: of all runs."""
    keys = list(choices[0].values)
    return {
        "format": FORMAT,
        "file": file,
        "arguments": list(arguments),
        "ranks": ranks,
        "varied": {key: list(dict.fromkeys(choice.values[key] for choice in choices)) for key in keys},
        "settings": [
            {"folder": choice.folder, "name": choice.name, "values": dict(choice.values)} for choice in choices
        ],
    }


def refuse_another_bench(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError if a folder contains a bench with other settings, or other files without a bench."""
    before = read_bench(folder / BENCH_FILE)
    fix = "choose another folder (--out), or remove this one"
    if before is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(Problem("--out", "the folder is not empty, and holds no bench", str(folder), fix=fix))
    for part in ("settings", "ranks"):
        if before is not None and before.get(part) != record[part]:
            existing = f"{before['varied']} on {before.get('ranks')} ranks"
            what = f"the folder holds a bench with other {part}: {shortened(existing, 400)}"
            raise UserError(Problem("--out", what, str(folder), fix=fix))


def write_bench_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `bench.json` atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{BENCH_FILE}"
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / BENCH_FILE)
