"""The vocabulary for people and editors: the documentation under each field, the JSON Schema, the reference page."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from quadriga.config import legacy_keys, support
from quadriga.config.keys import KEYS, Key, format_toml
from quadriga.config.schema import JobConfig, Section
from quadriga.config.sources import ENVIRONMENT


def documentation() -> Mapping[str, str]:
    """The documentation under each key's field, read from the source of the schema, by `section.key`."""
    docs: dict[type[Section], Mapping[str, str]] = {}
    for section in {key.section for key in KEYS.values()}:
        own = [_field_docs(base) for base in reversed(section.__mro__) if issubclass(base, Section)]
        docs[section] = {field: text for fields in own for field, text in fields.items()}
    return {name: docs[key.section][name.rpartition(".")[2]] for name, key in KEYS.items()}


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
    """(name, what it is about, keys) of every table, in the order of the schema."""
    grouped: dict[str, list[Key]] = {}
    for name, key in KEYS.items():
        grouped.setdefault(name.rpartition(".")[0], []).append(key)
    for name, keys in grouped.items():
        yield name, (keys[0].section.__doc__ or "").strip(), keys


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the TOML files, with which an editor completes and checks them."""
    schema = JobConfig.model_json_schema(mode="validation")
    docs = documentation()
    by_section: dict[str, dict[str, str]] = {}
    for name, key in KEYS.items():
        by_section.setdefault(key.section.__name__, {})[name.rpartition(".")[2]] = docs[name]
    for section, definition in schema["$defs"].items():
        for name, field in definition["properties"].items():
            if name in by_section.get(section, {}):
                field["description"] = by_section[section][name]
    schema["properties"]["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "A TOML file whose keys hold where this one says nothing, relative to this one's folder.",
    }
    schema["title"] = "Quadriga configuration"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_null(schema)}


def _without_null(node: Any) -> Any:
    """TOML has no null: an optional key is switched off by `"none"` or an empty text, and its default is left out."""
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
    page = [_INTRODUCTION.strip(), "## Tables and keys"]
    for name, about, keys in tables():
        rows = [
            (f"`{key.name.rpartition('.')[2]}`", key.allowed, f"`{format_toml(key.default)}`", docs[key.name])
            for key in keys
        ]
        page += [f"### [{name}]", about, _markdown(("key", "value", "default", "meaning"), rows)]
    page += _older_names()
    return "\n\n".join(page) + "\n"


def _older_names() -> list[str]:
    renamed = [(f"`{old}`", f"`{new}`") for old, new in legacy_keys.RENAMED.items()]
    renamed += [(f"`[{old}]`", f"`[{new}]`") for old, new in legacy_keys.MOVED_TABLES.items()]
    renamed += [
        (f'`model.converters = ["{old}"]`', f'`["{new}"]`') for old, new in legacy_keys.CONVERTER_ALIASES.items()
    ]
    gone = [(f"`{key}`", f"accepted; {remark}") for key, remark in legacy_keys.REMOVED.items()]
    gone += [(f"`{key}`", f"accepted when off, else refused; {remark}") for key, remark in legacy_keys.REFUSED.items()]
    missing = [(", ".join(f"`{key}`" for key in item.keys), item.name, item.instead) for item in support.UNSUPPORTED]
    return [
        "## Older names",
        "Files written for earlier releases of this vocabulary load; a notice names the new key.",
        _markdown(("then", "now"), renamed),
        _markdown(("gone", "what happens"), gone),
        "## Not built yet",
        "Training refuses these by name. A dry run (`DRY_RUN=1`) checks them with all the rest.",
        _markdown(("key", "feature", "what to do instead"), missing),
    ]


def _markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


_INTRODUCTION = f"""
<!-- Made by `quadriga docs` from quadriga/config/schema; edit the words there. -->

# Configuration

One TOML file is the whole experiment. What holds is, from weakest to strongest:

1. the defaults below;
2. the file named by `extends` (a path at the top of a TOML file, relative to that file), which may extend another;
3. the TOML file (`CONFIG_FILE` for `run_train.sh`, `--job.config_file` everywhere);
4. the environment ({", ".join(f"`{name}` for `{key}`" for name, key in ENVIRONMENT.items())});
5. the command line.

On the command line every key is `--table.key value` or `--table.key=value`; a switch is also `--table.key` and
`--table.no_key`; a list is `a,b` or `["a", "b"]`. An optional key is switched off by `"none"` or `""`.

Paths inside a TOML file are relative to the folder that the run is started from. In every key that names a file or a
folder, in `extends` and in `CONFIG_FILE`, `~` and `~user` stand for a home folder, `$NAME` and `${{NAME}}` for an
environment variable; one that is not set is refused by name.

Reading is strict: an unknown table or key, a value of the wrong type or out of range, and keys that do not go together
are refused, all in one report with the file and the line. No key is ever dropped in silence. Quadriga's own names for
assets that need no download are `training.dataset = "builtin"` and `model.hf_assets_path = "builtin:bytes"`; the names
`c4_test` and `./tests/assets/tokenizer` of other trainers' test files are read as these, with a notice.

[from-torchtitan.md](from-torchtitan.md) tells of every key of torchtitan v0.2.2, in which this vocabulary grew up,
whether it means the same here. Some defaults differ, where those were traps:
`checkpoint.last_save_model_only` is false, so that a finished run can be resumed; `training.max_norm = 0` switches
clipping off; `debug.seed` is a number, so that a run can be repeated; `profiling.profiler_active` is 5; traces go to
`profile_trace`.

An editor can complete and check these files: `quadriga schema > quadriga.schema.json`.
"""
