"""Reference of the configuration: the documentation of each field, the list of keys, JSON Schema, configuration.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from quadriga.config import legacy_keys
from quadriga.config.keys import ITEM_KEYS, KEYS, Key, format_toml
from quadriga.config.markdown import render
from quadriga.config.rules_torchtitan import UNSUPPORTED
from quadriga.config.schema import JobConfig, Section
from quadriga.config.sources import ENVIRONMENT
from quadriga.errors import Problem, UserError, nearest


def documentation() -> Mapping[str, str]:
    """The documentation of each key, by `section.key`, read from the source of the schema. Keys of the tables of a list
    are `training.sources[].weight`."""
    keys = {**KEYS, **ITEM_KEYS}
    docs: dict[type[Section], Mapping[str, str]] = {}
    for section in {key.section for key in keys.values()}:
        own = [_field_docs(base) for base in reversed(section.__mro__) if issubclass(base, Section)]
        docs[section] = {field: text for fields in own for field, text in fields.items()}
    return {name: docs[key.section][name.rpartition(".")[2]] for name, key in keys.items()}


def _field_docs(section: type[Section]) -> Mapping[str, str]:
    source = Path(str(sys.modules[section.__module__].__file__)).read_text(encoding="utf-8")
    body = next(
        node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    return {
        field.target.id: docs.value.value
        for field, docs in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(docs, ast.Expr)
        and isinstance(docs.value, ast.Constant)
        and isinstance(docs.value.value, str)
    }


def tables() -> Iterator[tuple[str, str, list[Key]]]:
    """(name, description, keys) of every table, in the order of the schema; then of the tables of lists."""
    grouped: dict[str, list[Key]] = {}
    for name, key in {**KEYS, **ITEM_KEYS}.items():
        grouped.setdefault(name.rpartition(".")[0], []).append(key)
    for name, keys in grouped.items():
        yield name, (keys[0].section.__doc__ or "").strip(), keys


def print_keys(words: Sequence[str] = ()) -> None:
    """Print all keys, or those that match all `words`, on standard output. Raises UserError if there is none.

    A word matches a key if it is the name of its table, or a part of its name or its meaning.
    """
    console, documented, found = _Console(highlight=False), documentation(), False
    for name, about, keys in tables():
        matching = [
            key for key in keys if all(_matches(word.lower(), name, key, documented[key.name]) for word in words)
        ]
        if matching:
            found = True
            console.print(Text.assemble((heading(name), "bold cyan"), f"  {about}\n"))
        for key in matching:
            default = "required" if key.field.is_required() else f"default {format_toml(key.default)}"
            values = f"  {key.allowed}; {default}"
            option = key.name.rpartition(".")[2] if key.name in ITEM_KEYS else f"--{key.name}"
            console.print(_indented(Text.assemble((option, "green"), (values, "dim")), 2))
            console.print(_indented(Text(documented[key.name]), 6))
        if matching:
            console.print()
    if not found:
        text = " ".join(words)
        raise UserError(Problem(text, "no key has this in its name or meaning", nearest=nearest(text, KEYS)))


def heading(table: str) -> str:
    """The name of a table as TOML writes it: `[training]`, or `[[training.sources]]` for one of a list."""
    return f"[[{table.removesuffix('[]')}]]" if table.endswith("[]") else f"[{table}]"


class _Console(Console):
    """Leaves a closed pipe to the command, as `print` does."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns), expand=False)


def _default(key: Key) -> str:
    return "" if key.field.is_required() else f"`{format_toml(key.default)}`"


def _matches(word: str, table: str, key: Key, meaning: str) -> bool:
    return word.strip("[]") == table or word in key.name or word in meaning.lower()


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the TOML files, for completion and checks in an editor."""
    schema = JobConfig.model_json_schema(mode="validation")
    docs = documentation()
    by_section: dict[str, dict[str, str]] = {}
    for name, key in {**KEYS, **ITEM_KEYS}.items():
        by_section.setdefault(key.section.__name__, {})[name.rpartition(".")[2]] = docs[name]
    for section, definition in schema["$defs"].items():
        for name, field in definition["properties"].items():
            if name in by_section.get(section, {}):
                field["description"] = by_section[section][name]
    schema["properties"]["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "A base TOML file, for the keys that this file does not set. Relative to this file's folder.",
    }
    schema["title"] = "Quadriga configuration"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_null(schema)}


def _without_null(node: Any) -> Any:
    """Replace null, which TOML lacks: `"none"` or `""` switches an optional key off, and a null default is omitted."""
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "null"}:
        return {"enum": ["none", ""]}
    return {name: _without_null(item) for name, item in node.items() if not (name == "default" and item is None)}


def reference_page() -> str:
    """`docs/configuration.md`."""
    docs = documentation()
    renamed = [(f"`{old}`", f"`{new}`") for old, new in legacy_keys.RENAMED.items()]
    renamed += [(f"`[{old}]`", f"`[{new}]`") for old, new in legacy_keys.MOVED_TABLES.items()]
    renamed += [(f'`model.converters = ["{old}"]`', f'`["{new}"]`') for old, new in legacy_keys.MOVED_TABLES.items()]
    gone = [(f"`{key}`", f"accepted; {remark}") for key, remark in legacy_keys.REMOVED.items()]
    gone += [(f"`{key}`", f"accepted when off, else refused; {remark}") for key, remark in legacy_keys.REFUSED.items()]
    return render(
        Path(__file__).with_name("configuration.md.jinja"),
        environment=", ".join(f"`{name}` for `{key}`" for name, key in ENVIRONMENT.items()),
        tables=(
            (
                heading(name),
                about,
                [(f"`{key.name.rpartition('.')[2]}`", key.allowed, _default(key), docs[key.name]) for key in keys],
            )
            for name, about, keys in tables()
        ),
        renamed=renamed,
        removed=gone,
        unsupported=[(", ".join(f"`{key}`" for key in each.keys), each.name, each.instead) for each in UNSUPPORTED],
    )
