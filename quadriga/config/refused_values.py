"""Values that the schema refuses, as problems; and the tables of a list, which are checked and expanded one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.config.keys import ITEM_KEYS, Key, format_toml
from quadriga.config.sources import COMMAND_LINE, expand
from quadriga.errors import Problem, nearest, shortened
from quadriga.limits import PATH, TEXT


def not_text(value: Any, longest: int) -> str | None:
    if isinstance(value, tuple):
        return next((wrong for item in value if (wrong := not_text(item, longest))), None)
    if not isinstance(value, str):
        return None
    if len(value) > longest:
        return f"is longer than {longest} characters"
    if "\0" in value:
        return "contains a null character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    return None


def refused_value(key: Key, value: Any, culprit: Any, kind: str, source: str) -> Problem:
    """A schema error as a `Problem`. `culprit` is the wrong value: the whole one, or an item of a list."""
    guess = nearest(culprit, key.choices) if isinstance(culprit, str) and key.choices else None
    if kind == "literal_error":
        what = f"unknown value {shortened(format_toml(culprit))}" if culprit != value else "unknown value"
    elif kind.endswith(("_type", "_parsing")):
        what = f"wrong type: {type_name(culprit)}"
    elif kind == "finite_number":
        what = "not a finite number"
    elif kind == "string_pattern_mismatch":
        what = "does not have the required form"
    elif kind == "string_too_short":
        what = "must not be empty"
    else:
        what = "out of range"
    written = isinstance(value, str) and source == COMMAND_LINE
    return Problem(key.name, what, value if written else format_toml(value), source, key.allowed, guess)


def type_name(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "a list",
        dict: "a table",
    }
    return names.get(type(value), type(value).__name__)


def expanded_items(key: Key, value: Any, source: str, environ: Mapping[str, str]) -> tuple[Any, list[Problem]]:
    """The tables of a list, without keys that are off (`none`), with `~` and `$NAME` of paths replaced; and problems.

    What is no table is left as it is, for the schema to refuse.
    """
    if not isinstance(value, tuple):
        return value, []
    tables, problems = [], []
    for number, table in enumerate(value, 1):
        if not isinstance(table, dict):
            tables.append(table)
            continue
        kept = dict(table)
        for name, item in table.items():
            inner = ITEM_KEYS.get(f"{key.name}[].{name}")
            if inner is not None and inner.optional and isinstance(item, str) and item.lower() in ("", "none"):
                del kept[name]
                continue
            where = f"{key.name}[{number}].{shortened(name)}"
            is_path = name.endswith("path")
            if (wrong := not_text(item, PATH if is_path else TEXT)) is not None:
                problems.append(Problem(where, wrong, format_toml(item), source))
            elif is_path and isinstance(item, str):
                kept[name] = expand(where, item, source, environ)
                problems += [kept[name]] if isinstance(kept[name], Problem) else []
        tables.append(kept)
    return tuple(tables), problems


def refused_item(key: Key, loc: Sequence[int | str], culprit: Any, kind: str, source: str) -> Problem:
    """A schema error in a list of tables. `loc`: the path of the error, which begins with that of the key."""
    index, *inside = loc[key.name.count(".") + 1 :] or (0,)
    where = f"{key.name}[{int(index) + 1}]"
    if not inside:
        return Problem(where, "is not a table", shortened(format_toml(culprit)), source, f"tables [[{key.name}]]")
    name = str(inside[0])
    where = f"{where}.{'.'.join(shortened(part) for part in inside)}"
    names = [inner.rpartition(".")[2] for inner in ITEM_KEYS if inner.startswith(f"{key.name}[].")]
    if kind == "extra_forbidden":
        what, allowed = f"[[{key.name}]] has no such key", ", ".join(names)
        return Problem(where, what, shortened(format_toml(culprit)), source, allowed, nearest(name, names))
    if kind == "missing":
        return Problem(where, "is missing", None, source, ITEM_KEYS[f"{key.name}[].{name}"].allowed)
    return replace(refused_value(ITEM_KEYS[f"{key.name}[].{name}"], culprit, culprit, kind, source), where=where)
