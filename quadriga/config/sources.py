"""Where a configuration is written: TOML files and their bases, the environment, the command line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import Problem, nearest

CONFIG_FILE = "job.config_file"
COMMAND_LINE = "command line"
ENVIRONMENT = {"COMM_BACKEND": "comm.backend"}


@dataclass(frozen=True)
class Text:
    """A value that came as text and is still to be read; None is a switch without a value (`--section.key`)."""

    text: str | None


@dataclass(frozen=True)
class Entry:
    """One key, its value, and who said it. Tables of a TOML file are entries too until they are taken apart."""

    key: str
    value: Any
    source: str


def file_layers(path: str) -> tuple[list[list[Entry]], list[Problem]]:
    """The entries of a TOML file and of its bases, the remotest base first."""
    layers: list[list[Entry]] = []
    seen: list[Path] = []
    said_by: str | None = None
    while True:
        here = Path(path)
        if here.resolve() in seen:
            chain = " -> ".join(str(file) for file in [*seen, here.resolve()])
            return [], [Problem("extends", f"the files extend one another in a circle: {chain}", path, said_by)]
        seen.append(here.resolve())
        table, lines, problem = _read(here, path, said_by)
        if problem is not None:
            return [], [problem]
        base = table.pop("extends", None)
        layers.insert(0, [Entry(key, value, f"{path}, line {lines[key]}") for key, value in _leaves(table, lines)])
        if base is None:
            return layers, []
        said_by = f"{path}, line {lines['extends']}"
        if not isinstance(base, str) or not base:
            return [], [Problem("extends", "not the path of a file", repr(base), said_by, "a path in quotes")]
        path = str(here.parent / base)


def _read(path: Path, said: str, said_by: str | None) -> tuple[dict[str, Any], Mapping[str, int], Problem | None]:
    where = "extends" if said_by else CONFIG_FILE
    source = said_by or COMMAND_LINE
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), _Lines(text), None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        number = line.group(1) if line else max(len(text.splitlines()), 1)  # else it is the end of the document
        return (
            {},
            {},
            Problem(f"{said}, line {number}", f"this is not TOML: {error}", fix="see https://toml.io for the format"),
        )
    except UnicodeDecodeError as error:
        return {}, {}, Problem(said, f"this is not UTF-8 text: byte {error.start}", fix="save the file as UTF-8")
    except IsADirectoryError:
        problem = Problem(where, "a folder where a TOML file is needed", said, source, **_neighbours(path))
    except FileNotFoundError:
        problem = Problem(where, "no such file", said, source, **_neighbours(path.parent, path.name))
    except OSError as error:
        problem = Problem(where, f"the file cannot be read: {error.strerror}", said, source)
    return {}, {}, problem


def _neighbours(folder: Path, name: str | None = None) -> dict[str, str]:
    """What a user may have meant: the TOML files of a folder, or else the nearest folder that is there."""
    while not folder.is_dir():
        name, folder = folder.name, folder.parent
    try:
        files = sorted(str(file) for pattern in ("*.toml", "*/*.toml") for file in folder.glob(pattern))
        entries = [entry.name for entry in folder.iterdir()]
    except OSError:
        return {}
    found = {"fix": f"choose one of {', '.join(files[:8])}"} if files else {"fix": f"no TOML file lies in {folder}"}
    close = nearest(name, entries) if name else None
    return {**found, "nearest": str(folder / close)} if close else found


class _Lines(dict[str, int]):
    """The line of each key of a TOML text; of a key that cannot be found, the line of its table, else 1."""

    def __init__(self, text: str) -> None:
        super().__init__()
        table, fenced = "", False
        for number, line in enumerate(text.splitlines(), start=1):
            fences = line.count('"""') + line.count("'''")
            if not fenced and (header := re.match(r"\s*\[([\w.\- ]+)\]", line)):
                table = header.group(1).replace(" ", "") + "."
                self.setdefault(table.rstrip("."), number)
            elif not fenced and (key := re.match(r"\s*([\w.\-]+)\s*=", line)):
                self.setdefault(table + key.group(1), number)
            fenced ^= fences % 2 == 1

    def __missing__(self, key: str) -> int:
        table, _, _ = key.rpartition(".")
        return self[table] if table else 1


def _leaves(table: Mapping[str, Any], lines: Mapping[str, int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, lines, f"{prefix}{name}.")
        elif not isinstance(value, dict) or f"{prefix}{name}" in lines:
            yield prefix + name, value


def environment_layer(environ: Mapping[str, str]) -> list[Entry]:
    return [Entry(key, Text(environ[name]), name) for name, key in ENVIRONMENT.items() if environ.get(name)]


def command_line_layer(argv: Sequence[str]) -> tuple[list[Entry], list[Problem]]:
    """`--section.key value`, `--section.key=value`, `--section.key` and `--section.no_key` for switches."""
    entries, problems = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            form = "--section.key value, --section.key=value, or --section.no_key for a switch"
            fix = "`quadriga keys` explains all keys"
            problems.append(Problem(word, "not a key of the configuration", source=COMMAND_LINE, allowed=form, fix=fix))
            continue
        name, equals, text = word[2:].partition("=")
        value: str | None = text if equals else None
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        entries.append(Entry(name.replace("-", "_"), Text(value), COMMAND_LINE))
    return entries, problems
