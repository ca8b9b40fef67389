"""The sources of a configuration: TOML files and their bases, the environment, the command line. Paths in them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quadriga.config.keys import KEYS
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.limits import EXTENDS, TOML_BYTES
from quadriga.reading import parse_toml, read_text

CONFIG_FILE = "job.config_file"
COMMAND_LINE = "command line"
MAX_ENTRIES = 200  # entries of a folder that are searched for a similar name
ENVIRONMENT = {"COMM_BACKEND": "comm.backend"}
# The keys that name files and folders, in which `~` and `$VARIABLES` are replaced.
PATHS = {key for key in KEYS if key.endswith(("folder", "path", "file", "csv"))} | {"estimate.device"}
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# Parts of a TOML text: a key in one of its three forms, a dotted key, what is between two of them, parts of a value.
_PART_OF_A_KEY = re.compile(r"""[\w-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_NAME_OF_A_KEY = re.compile(rf"[ \t]*(?:{_PART_OF_A_KEY.pattern})(?:[ \t]*\.[ \t]*(?:{_PART_OF_A_KEY.pattern}))*")
_TO_THE_NEXT = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_TOKEN = re.compile(
    r""""{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]""", re.DOTALL
)


@dataclass(frozen=True)
class RawText:
    """A value as unparsed text; None is a switch without a value (`--section.key`)."""

    text: str | None


@dataclass(frozen=True)
class Entry:
    """One key, its value, and where it was set. An empty table of a TOML file is an entry too."""

    key: str
    value: Any
    source: str


def file_layers(path: str, environ: Mapping[str, str]) -> tuple[list[list[Entry]], list[Problem]]:
    """The entries of a TOML file and of its bases, the most distant base first."""
    layers: list[list[Entry]] = []
    seen: list[str] = []
    named_by: str | None = None
    while True:
        problem = _unreadable(path, named_by)
        here = os.path.realpath(path) if problem is None else ""
        if here in seen:
            chain = " -> ".join([*seen, here])
            return [], [Problem("extends", f"the files extend one another in a circle: {chain}", path, named_by)]
        if len(seen) > EXTENDS:
            allowed = f"at most {EXTENDS} files that extend one another"
            return [], [Problem("extends", "the chain of files is too long", path, named_by, allowed)]
        if problem is not None:
            return [], [problem]
        seen.append(here)
        try:
            text = read_text(path, TOML_BYTES, what="configuration file")
            table = parse_toml(text, shortened(path))
        except UserError as error:
            return [], list(error.problems)
        lines, base = _Lines(text), table.pop("extends", None)
        layers.insert(0, [Entry(key, value, f"{path}, line {lines[key]}") for key, value in _leaves(table, lines)])
        if base is None:
            return layers, []
        named_by = f"{path}, line {lines['extends']}"
        if not isinstance(base, str) or not base:
            return [], [Problem("extends", "not the path of a file", repr(base), named_by, "a path in quotes")]
        following = expand("extends", base, named_by, environ)
        if isinstance(following, Problem):
            return [], [following]
        path = os.path.join(os.path.dirname(path), following)


def _unreadable(path: str, named_by: str | None) -> Problem | None:
    """A problem if there is no file to read, with a suggestion; else None."""
    where, source = ("extends", named_by) if named_by else (CONFIG_FILE, COMMAND_LINE)
    try:
        kind = os.stat(path).st_mode
    except ValueError:
        return Problem(where, "a null character in the name of a file", path, source)
    except (FileNotFoundError, NotADirectoryError):
        folder, name = os.path.split(path)
        return Problem(where, "no such file", path, source, **_nearby_files(folder or ".", name))
    except OSError as error:
        return Problem(where, f"the file cannot be read: {error.strerror}", path, source)
    if stat.S_ISDIR(kind):
        return Problem(where, "a folder, not a TOML file", path, source, **_nearby_files(path))
    return None


def _nearby_files(folder: str, name: str | None = None) -> dict[str, str]:
    """Suggestions for a wrong path: the TOML files of its folder, or of the nearest folder above that exists."""
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        folder = folder or "."
    try:
        entries = _names(folder)
        files = [file for file in entries if file.endswith(".toml")]
        for entry in entries:
            if os.path.isdir(inner := os.path.join(folder, entry)):
                files += [os.path.join(entry, file) for file in _names(inner) if file.endswith(".toml")]
    except OSError:
        return {}
    shown = sorted(os.path.normpath(os.path.join(folder, file)) for file in files)[:8]
    found = {"fix": f"choose one of {', '.join(shown)}"} if shown else {"fix": f"there is no TOML file in {folder}"}
    close = nearest(name, entries) if name else None
    return {**found, "nearest": os.path.normpath(os.path.join(folder, close))} if close else found


def _names(folder: str) -> list[str]:
    """The names in a folder, at most `MAX_ENTRIES`."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in islice(entries, MAX_ENTRIES)]


class _Lines(dict[str, int]):
    """The line of each table and key of a valid TOML text. For a key within an inline table, that of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        table, at, line = "", 0, 1
        while (begins := _TO_THE_NEXT.match(text, at)) is not None and begins.end() < len(text):
            line += text.count("\n", at, begins.end())
            at = begins.end()
            brackets = len(text[at : at + 2]) - len(text[at : at + 2].lstrip("["))
            name = _NAME_OF_A_KEY.match(text, at + brackets)
            if name is None:  # not TOML as the parser reads it
                break
            path = ".".join(_unquoted(part) for part in _PART_OF_A_KEY.findall(name.group()))
            self.setdefault(path if brackets else table + path, line)
            table = f"{path}." if brackets else table
            ends = _end_of_value(text, name.end())
            line, at = line + text.count("\n", at, ends), ends

    def __missing__(self, key: str) -> int:
        table, _, _ = key.rpartition(".")
        return self[table] if table else 1


def _unquoted(part: str) -> str:
    return str(parse_toml(f"key = {part}", "a key")["key"]) if part[0] in "\"'" else part


def _end_of_value(text: str, at: int) -> int:
    """The end of the line on which a value ends that begins after `at`. Strings and brackets may span lines."""
    depth = 0
    for token in _TOKEN.finditer(text, at):
        found = token.group()
        if found == "\n" and depth <= 0:
            return token.start()
        depth += (found in "[{") - (found in "]}")
    return len(text)


def _leaves(table: Mapping[str, Any], lines: Mapping[str, int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, lines, f"{prefix}{name}.")
        elif not isinstance(value, dict) or f"{prefix}{name}" in lines:
            yield prefix + name, value


def environment_layer(environ: Mapping[str, str]) -> list[Entry]:
    return [Entry(key, RawText(environ[name]), name) for name, key in ENVIRONMENT.items() if environ.get(name)]


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
        entries.append(Entry(name.replace("-", "_"), RawText(value), COMMAND_LINE))
    return entries, problems


def expand(where: str, text: str, source: str | None, environ: Mapping[str, str]) -> str | Problem:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced; a problem if one of them is not defined."""
    if "${" in _VARIABLE.sub("", text):
        return Problem(where, "a `${` has no `}`", text, source, "$NAME or ${NAME}")
    for match in _VARIABLE.finditer(text):
        name = match.group(1) if match.group(1) is not None else match.group(2)
        if not _NAME.fullmatch(name):
            return Problem(where, f"`{match.group()}` is not a variable", text, source, "$NAME or ${NAME}")
        if name not in environ:
            fix = f"export {name}, or write the path itself"
            what = f"the environment variable {name} is not set"
            return Problem(where, what, text, source, nearest=nearest(name, environ), fix=fix)
    expanded = _VARIABLE.sub(lambda match: environ[match.group(1) or match.group(2)], text)
    if not expanded.startswith("~"):
        return expanded
    home, slash, rest = expanded.partition("/")
    if home == "~" and environ.get("HOME"):
        return environ["HOME"] + slash + rest
    try:
        return str(Path(home).expanduser()) + slash + rest
    except RuntimeError:
        return Problem(where, f"there is no home folder for `{home}`", text, source, fix="write the path itself")
