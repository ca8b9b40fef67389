"""Reference of the configuration: the documentation of each field, the list of keys, JSON Schema, configuration.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from quadriga.config import legacy_keys
from quadriga.config.keys import KEYS, Key, format_toml
from quadriga.config.markdown import table
from quadriga.config.rules_torchtitan import UNSUPPORTED
from quadriga.config.schema import JobConfig, Section
from quadriga.config.sources import ENVIRONMENT
from quadriga.errors import Problem, UserError, nearest


def documentation() -> Mapping[str, str]:
    """The documentation of each key, by `section.key`, read from the source of the schema."""
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
    """(name, description, keys) of every table, in the order of the schema."""
    grouped: dict[str, list[Key]] = {}
    for name, key in KEYS.items():
        grouped.setdefault(name.rpartition(".")[0], []).append(key)
    for name, keys in grouped.items():
        yield name, (keys[0].section.__doc__ or "").strip(), keys


def print_keys(words: Sequence[str] = ()) -> None:
    """Print all keys, or those that match all `words`, on standard output. Raises UserError if there is none.

    A word matches a key if it is the name of its table, or a part of its name or its meaning.
    """
    console, documented, found = Console(highlight=False), documentation(), False
    for name, about, keys in tables():
        matching = [
            key for key in keys if all(_matches(word.lower(), name, key, documented[key.name]) for word in words)
        ]
        if matching:
            found = True
            console.print(Text.assemble((f"[{name}]", "bold cyan"), f"  {about}\n"))
        for key in matching:
            values = f"  {key.allowed}; default {format_toml(key.default)}"
            console.print(_indented(Text.assemble((f"--{key.name}", "green"), (values, "dim")), 2))
            console.print(_indented(Text(documented[key.name]), 6))
        if matching:
            console.print()
    if not found:
        text = " ".join(words)
        raise UserError(Problem(text, "no key has this in its name or meaning", nearest=nearest(text, KEYS)))


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns), expand=False)


def _matches(word: str, table: str, key: Key, meaning: str) -> bool:
    return word.strip("[]") == table or word in key.name or word in meaning.lower()


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the TOML files, for completion and checks in an editor."""
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
    page = [_INTRODUCTION.strip(), "## Tables and keys"]
    for name, about, keys in tables():
        rows = [
            (f"`{key.name.rpartition('.')[2]}`", key.allowed, f"`{format_toml(key.default)}`", docs[key.name])
            for key in keys
        ]
        page += [f"### [{name}]", about, table(("key", "value", "default", "meaning"), rows)]
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
    missing = [(", ".join(f"`{key}`" for key in item.keys), item.name, item.instead) for item in UNSUPPORTED]
    return [
        "## Older names",
        "Files for older releases of torchtitan load. A notice names the new key.",
        table(("old name", "new name"), renamed),
        table(("removed key", "effect"), gone),
        "## Not supported yet",
        "Training refuses these keys by name. A dry run (`DRY_RUN=1`) accepts them, with a notice.",
        table(("key", "feature", "what to do instead"), missing),
    ]


_INTRODUCTION = f"""
<!-- Made by `quadriga docs` from quadriga/config/schema; edit the text there. -->

# Configuration

One TOML file describes a run. A key can have several sources. Later ones in this list override earlier ones:

1. the defaults below;
2. the file named by `extends` (a path at the top of a TOML file, relative to that file), which may extend another;
3. the TOML file (`CONFIG_FILE` for `run_train.sh`, `--job.config_file` everywhere);
4. the environment ({", ".join(f"`{name}` for `{key}`" for name, key in ENVIRONMENT.items())});
5. the command line.

**Command line.** Write a key as `--table.key value` or `--table.key=value`. A switch is also `--table.key` and
`--table.no_key`. A list is `a,b` or `["a", "b"]`. `"none"` or `""` switches an optional key off.

**Paths.** Paths in a TOML file are relative to the directory that the run is started from. In every key that names a
file or a folder, in `extends` and in `CONFIG_FILE`, `~`, `~user`, `$NAME` and `${{NAME}}` are replaced. A variable that
is not set is refused by name.

**Strict reading.** Unknown tables or keys, values of the wrong type or out of range, and keys that do not fit together
are refused. One report lists all of them, with the file and the line. No key is ignored silently.

**Assets without a download.** `training.dataset = "builtin"` and `model.hf_assets_path = "builtin:bytes"` need no
files. The names `c4_test` and `./tests/assets/tokenizer` of torchtitan's test files are read as these, with a notice,
if the files do not exist.

**torchtitan.** The keys are those of torchtitan. [from-torchtitan.md](from-torchtitan.md) says for every key of v0.2.2
whether it means the same here. Some defaults differ, because those of torchtitan have side effects:

- `checkpoint.last_save_model_only` is false, so that a finished run can be resumed.
- `training.max_norm = 0` switches clipping off.
- `debug.seed` is a number, so that a run can be repeated.
- `profiling.profiler_active` is 5, and traces go to `profile_trace`.

**Editors** can complete and check these files: `quadriga schema > quadriga.schema.json`.
"""
