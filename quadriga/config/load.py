"""Merges the sources of a configuration key by key: defaults < `extends` base < TOML < environment < command line.

No key is ignored silently. A key is known and has the right type, or it is renamed or removed with a notice, or it is a
problem. All problems are found, not only the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quadriga.config import legacy_keys, titan_datasets
from quadriga.config.keys import KEYS, Key, format_toml, is_section, parse_value
from quadriga.config.refused_values import expanded_items, not_text, refused_item, refused_value
from quadriga.config.schema import JobConfig
from quadriga.config.sources import (
    COMMAND_LINE,
    CONFIG_FILE,
    PATHS,
    Entry,
    RawText,
    command_line_layer,
    environment_layer,
    expand,
    file_layers,
)
from quadriga.errors import Problem, nearest, shortened
from quadriga.limits import PATH, TEXT, TOML_PROBLEMS

# Of torchtitan: they separate documents by block-causal masks.
MASKED_FLAVORS = ("_flex_attn", "_varlen_attn", "_flex", "_varlen")


@dataclass
class LoadedConfig:
    """A configuration, the source of each key (`origin`), and notices and problems.

    `bad` contains the refused keys. They have their default in `config`, so that the other keys can be checked.
    """

    config: JobConfig = field(default_factory=JobConfig)
    origin: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)

    def refuse(self, key: str, problem: Problem) -> None:
        self.problems.append(problem)
        self.bad.add(key)

    def update(self, table: str, **values: Any) -> None:
        """Set keys of a table, which may lie in another one."""
        self.config = _updated(self.config, table.split("."), values)


def _updated(section: Any, tables: list[str], values: dict[str, Any]) -> Any:
    if tables:
        values = {tables[0]: _updated(getattr(section, tables[0]), tables[1:], values)}
    return section.model_copy(update=values)


def load(argv: Sequence[str], environ: Mapping[str, str]) -> LoadedConfig:
    """Read and merge a configuration. `argv` is without the program's name; `--job.config_file` names the TOML file."""
    loaded = LoadedConfig()
    arguments, problems = command_line_layer(argv)
    loaded.problems += problems
    file = next((entry.value.text for entry in reversed(arguments) if entry.key == CONFIG_FILE), None)
    place = expand(CONFIG_FILE, file, COMMAND_LINE, environ) if file is not None else None
    if place == "":
        place = Problem(CONFIG_FILE, "is empty", "", COMMAND_LINE, "a TOML file", fix="name a TOML file")
    files, problems = (
        ([], [place]) if isinstance(place, Problem) else file_layers(place, environ) if place else ([], [])
    )
    loaded.problems += problems
    if problems:
        loaded.bad |= set(KEYS)  # the file could have set any of them

    raw: dict[str, Any] = {}
    for layer in [*files, environment_layer(environ), arguments]:
        _merge(layer, raw, loaded)
    if isinstance(place, str) and CONFIG_FILE in raw:
        raw[CONFIG_FILE] = place
    for key in raw:
        _expand_path(key, raw, loaded, environ)
        raw[key] = _resolve_alias(key, raw, loaded)
    loaded.notices += titan_datasets.resolve_datasets(raw, loaded.origin)
    loaded.notices += _resolve_masked_flavor(raw, loaded.origin)
    _validate(raw, loaded)
    _note_defaults(loaded)
    return loaded


def _merge(layer: Iterable[Entry], raw: dict[str, Any], loaded: LoadedConfig) -> None:
    """Merge one source over the earlier ones, under the current names of keys."""
    seen_keys: dict[str, Entry] = {}
    for entry in layer:
        if len(loaded.problems) >= TOML_PROBLEMS:
            return
        renamed = _rename(entry, loaded)
        if renamed is None:
            continue
        key = KEYS[renamed.key]
        earlier = seen_keys.get(renamed.key)
        value = _typed(key, renamed, loaded)
        if earlier is not None and earlier.key != entry.key and value != raw[renamed.key]:
            what = f"the old name {_old_name(earlier.key, entry.key)} and the new one are both set, and differ"
            fix = f"keep only {renamed.key}"
            where = f"{earlier.key}, {entry.key}"
            loaded.refuse(renamed.key, Problem(where, what, format_toml(value), entry.source, fix=fix))
        seen_keys[renamed.key] = entry
        raw[renamed.key] = value
        loaded.origin[renamed.key] = renamed.source


def _expand_path(key: str, raw: dict[str, Any], loaded: LoadedConfig, environ: Mapping[str, str]) -> None:
    """Refuse text that is too long or not UTF-8, and expand `~` and `$NAME` in paths."""
    value, source = raw[key], loaded.origin[key]
    if KEYS[key].item is not None:
        tables, problems = expanded_items(KEYS[key], value, source, environ)
        raw[key] = KEYS[key].default if problems else tables
        for problem in problems:
            loaded.refuse(key, problem)
    elif (wrong := not_text(value, PATH if key in PATHS else TEXT)) is not None:
        loaded.refuse(key, Problem(key, wrong, format_toml(value), source))
        raw[key] = KEYS[key].default
    elif (
        key in PATHS - {CONFIG_FILE}
        and isinstance(value, str)
        and (key != "estimate.device" or value.endswith(".toml"))
    ):
        expanded = expand(key, value, source, environ)
        if isinstance(expanded, Problem):
            loaded.refuse(key, expanded)
        else:
            raw[key] = expanded


def _old_name(*names: str) -> str:
    return next(name for name in names if name not in KEYS)


def _rename(entry: Entry, loaded: LoadedConfig) -> Entry | None:
    """The entry under its current name; None, with a notice or a problem, if there is none."""
    name, value = entry.key, entry.value
    if name == CONFIG_FILE and entry.source != COMMAND_LINE:
        loaded.notices.append(
            f"{name} [{entry.source}] is ignored: name the file on the command line, and a base with `extends`"
        )
        return None
    if name in KEYS:
        return entry
    if name in legacy_keys.REMOVED:
        remark = legacy_keys.REMOVED[name]
        loaded.notices.append(f"{name} [{entry.source}] was removed and has no effect: {remark}")
        return None
    if name in legacy_keys.REFUSED:
        _refuse_unless_off(entry, legacy_keys.REFUSED[name], loaded)
        return None
    if (new := legacy_keys.renamed_key(name)) is not None:
        loaded.notices.append(f"{name} [{entry.source}] is now {new}")
        return _rename(Entry(new, _renamed_value(name, value), entry.source), loaded)
    if value == {} and name in _tables():
        return None
    section, _, leaf = name.rpartition(".")
    switch = f"{section}.{leaf.removeprefix('no_')}"
    if isinstance(value, RawText) and leaf.startswith("no_") and switch in KEYS and KEYS[switch].boolean:
        if value.text is None:
            return Entry(switch, False, entry.source)
        fix = f"write --{name}, or --{switch} false"
        loaded.refuse(switch, Problem(name, "takes no value", format_toml(value.text), entry.source, fix=fix))
        return None
    loaded.problems.append(_unknown(entry))
    return None


def _renamed_value(old: str, value: Any) -> Any:
    values = legacy_keys.RENAMED_VALUES.get(old, {})
    if isinstance(value, RawText):
        if value.text is None:  # a switch without a value
            return RawText(values.get("true"))
        return RawText(values.get(value.text.lower(), value.text))
    if isinstance(value, bool) and values:
        return values.get(str(value).lower(), value)
    return values.get(value, value) if isinstance(value, str) else value


def _refuse_unless_off(entry: Entry, reason: str, loaded: LoadedConfig) -> None:
    text = entry.value.text if isinstance(entry.value, RawText) else None
    if not entry.value or (text is not None and text.lower() in ("", "false", "none", "[]")):
        loaded.notices.append(f"{entry.key} [{entry.source}] was removed; it is off, so nothing changes")
        return
    what = "this key of older releases would change the run, and is not supported"
    loaded.problems.append(Problem(entry.key, what, _as_written(entry), entry.source, fix=reason))


def _unknown(entry: Entry) -> Problem:
    name = entry.key
    table, _, leaf = name.rpartition(".")
    shown = _as_written(entry)
    if name in _tables() or entry.value == {} or (table and table not in _tables()):
        return _wrong_table(entry, shown)
    inside = [key for key in KEYS if key.rpartition(".")[0] == table]
    elsewhere = [key for key in KEYS if key.rpartition(".")[2] == leaf]
    guess = elsewhere[0] if elsewhere else nearest(name, inside) or nearest(name, KEYS)
    if not table:
        what, fix = "this key is outside every table", "put it into the table that it belongs to"
        return Problem(name, what, shown, entry.source, f"tables: {', '.join(_roots())}; `extends`", guess, fix)
    what = f"[{shortened(table)}] has no such key"
    return Problem(name, what, shown, entry.source, _short_list(table, inside), guess, "correct or remove it")


def _wrong_table(entry: Entry, shown: str | None) -> Problem:
    """A value in place of a table, or an unknown table."""
    inside = next((key for key in KEYS if KEYS[key].item and f"{entry.key}.".startswith(f"{key}.")), None)
    if inside is not None:
        fix = f"write [[{inside}]] in the file, or all of them as --{inside}='[{{...}}, {{...}}]'"
        return Problem(entry.key, f"this is a list of tables: [[{inside}]]", shown, entry.source, fix=fix)
    if entry.key in _tables():
        several = isinstance(entry.value, list) and all(isinstance(item, dict) for item in entry.value)
        what = f"this is one table: [{entry.key}], not [[{entry.key}]]" if several else "this is a table, not a key"
        return Problem(entry.key, what, shown, entry.source, _short_list(entry.key, list(KEYS)))
    table = entry.key if entry.value == {} else entry.key.rpartition(".")[0]
    guess = nearest(table, _tables()) or nearest(table.partition(".")[0], _roots())
    what = f"there is no table [{shortened(table)}]"
    return Problem(entry.key, what, shown, entry.source, f"tables: {', '.join(_roots())}", guess and f"[{guess}]")


def _tables() -> set[str]:
    names = [key.split(".")[:-1] for key in KEYS]
    return {".".join(parts[: end + 1]) for parts in names for end in range(len(parts))}


def _roots() -> list[str]:
    return [name for name, field in JobConfig.model_fields.items() if is_section(field.annotation)]


def _short_list(table: str, keys: list[str]) -> str:
    names = [key.removeprefix(table + ".") for key in keys if key.startswith(table + ".")]
    return f"keys of [{table}]: {', '.join(names)}"


def _as_written(entry: Entry) -> str | None:
    if isinstance(entry.value, dict):
        return None
    return entry.value.text if isinstance(entry.value, RawText) else format_toml(entry.value)


def _typed(key: Key, entry: Entry, loaded: LoadedConfig) -> Any:
    """The value for the schema: text is parsed, lists become tuples, `"none"` and `""` of an optional key None."""
    value = entry.value
    if isinstance(value, RawText):
        if value.text is None:
            if key.boolean:
                return True
            loaded.refuse(key.name, Problem(key.name, "needs a value", source=entry.source, allowed=key.allowed))
            return key.default
        if key.optional and value.text.lower() in ("", "none"):
            return None
        value = parse_value(key, value.text)
    if key.optional and isinstance(value, str) and value.lower() in ("", "none"):
        return None
    return _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _resolve_alias(key: str, raw: Mapping[str, Any], loaded: LoadedConfig) -> Any:
    """The value, or Quadriga's name for it if torchtitan has another one."""
    value, alias, why = raw[key], raw[key], ""
    if key == "model.hf_assets_path" and _is_test_tokenizer(value) and not Path(value).exists():
        alias, why = "builtin:bytes", titan_datasets.missing_tokenizer()
    if key == legacy_keys.SCHEDULE and isinstance(value, str):
        alias = legacy_keys.resolve_schedule(value, KEYS[key].choices)
    if key == "model.converters" and isinstance(value, tuple):
        alias = tuple(legacy_keys.MOVED_TABLES.get(name, name) for name in value)
    if alias != value:
        loaded.notices.append(
            f"{key} = {format_toml(value)} [{loaded.origin[key]}] is read as {format_toml(alias)}{why}"
        )
    return alias


def _resolve_masked_flavor(raw: dict[str, Any], origin: dict[str, str]) -> Iterator[str]:
    """Read torchtitan's flavors that mask documents as the flavor and the key. Yields the notice."""
    key, mask, flavor = "model.flavor", "training.document_mask", raw.get("model.flavor")
    suffix = next((each for each in MASKED_FLAVORS if isinstance(flavor, str) and flavor.endswith(each)), None)
    if suffix is None:
        return
    raw[key] = str(flavor).removesuffix(suffix)
    if mask not in raw:
        raw[mask], origin[mask] = True, origin[key]
    yield (
        f"{key} = {format_toml(flavor)} [{origin[key]}] is read as {format_toml(raw[key])} with {mask} = "
        f"{format_toml(raw[mask])}: no token sees another document, and the first token of a document is no label "
        "(torchtitan counts it)"
    )


def _is_test_tokenizer(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("./").rstrip("/") == "tests/assets/tokenizer"


def _validate(raw: Mapping[str, Any], loaded: LoadedConfig) -> None:
    """Make the frozen configuration. A value that the schema refuses is a problem, and its key gets the default."""
    try:
        loaded.config = JobConfig.model_validate(_nested(raw))
    except ValidationError as error:
        refused: dict[str, Problem] = {}
        for pydantic_error in error.errors(include_url=False):
            path = ".".join(str(part) for part in pydantic_error["loc"])
            name = next(key for key in raw if path == key or path.startswith(key + "."))
            loaded.bad.add(name)
            culprit, kind, source = pydantic_error["input"], pydantic_error["type"], loaded.origin[name]
            if KEYS[name].item is not None:
                refused.setdefault(path, refused_item(KEYS[name], pydantic_error["loc"], culprit, kind, source))
            else:
                refused.setdefault(name, refused_value(KEYS[name], raw[name], culprit, kind, source))
        loaded.problems += refused.values()
        loaded.config = JobConfig.model_validate(_nested({key: raw[key] for key in raw if key not in loaded.bad}))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, leaf = key.split(".")
        table = root
        for name in tables:
            table = table.setdefault(name, {})
        table[leaf] = value
    return root


def _note_defaults(loaded: LoadedConfig) -> None:
    """Add notices where a default that differs from torchtitan's changes what a file does that does not set it."""
    _shorten_profiler_cycle(loaded)
    if not loaded.config.checkpoint.enable or "checkpoint.last_save_model_only" in loaded.origin:
        return
    if loaded.config.checkpoint.export_dtype != "float32" and not loaded.config.checkpoint.last_save_in_hf:
        loaded.update("checkpoint", last_save_model_only=True)
        what = "checkpoint.export_dtype converts only a last save of weights"
        loaded.notices.append(f"{what}: checkpoint.last_save_model_only is set to true")
    else:
        what = "the last save also contains the optimizer, so that the run can be resumed and extended"
        loaded.notices.append(f"checkpoint.last_save_model_only is false by default: {what}")


def _shorten_profiler_cycle(loaded: LoadedConfig) -> None:
    """Shorten the profiler's default warm-up and recording if `profile_freq` is shorter than both. Older files set only
    that key."""
    profiling, table = loaded.config.profiling, "profiling"
    length, warmup, active = profiling.profile_freq, profiling.profiler_warmup, profiling.profiler_active
    if not profiling.enable_profiling or length >= warmup + active:
        return
    given = {name for name in ("profiler_warmup", "profiler_active") if f"{table}.{name}" in loaded.origin}
    if "profiler_warmup" not in given:
        warmup = max(min(warmup, length - (active if "profiler_active" in given else 1)), 0)
    if "profiler_active" not in given:
        active = max(min(active, length - warmup), 1)
    if len(given) == 2 or length < warmup + active:
        return
    changes = {"profiler_warmup": warmup, "profiler_active": active}
    loaded.update(table, **changes)
    shown = " and ".join(f"{table}.{name} = {value}" for name, value in changes.items() if name not in given)
    loaded.notices.append(f"{table}.profile_freq = {length} is shorter than a default cycle: {shown} fit into it")
