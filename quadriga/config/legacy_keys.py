"""Keys and values of torchtitan v0.1.0 to v0.2.2 that have another name here, or do not exist; and changed defaults.

`OLD_DEFAULTS` has the keys of Quadriga whose default has changed, with their old default, for runs that were started
before the change. For each of these keys that the user does not set, a resumed run keeps the value that it was started
with: that of the configuration in its checkpoint, or the old default if the key did not exist then.

A change of a default on which the numbers of a training depend needs a line there. A new key whose default does not
change training needs none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quadriga.reading import read_toml

_TABLES = read_toml(Path(__file__).with_suffix(".toml"))  # explains each table
RENAMED: Mapping[str, str] = _TABLES["renamed"]
MOVED_TABLES: Mapping[str, str] = _TABLES["moved_tables"]
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = _TABLES["renamed_values"]
REMOVED: Mapping[str, str] = _TABLES["removed"]
REFUSED: Mapping[str, str] = _TABLES["refused"]

SCHEDULE = "parallelism.pipeline_parallel_schedule"
OLD_DEFAULTS: Mapping[str, Any] = {
    "lr_scheduler.variant": "early_decay",
    "optimizer.decay_norms_and_biases": False,
    "quantize.linear.float8.filter_fqns": (),
}


def resolve_schedule(value: str, known: Collection[str]) -> str:
    """The name of a pipeline schedule for a name in upper or lower case, as PyTorch reads it; else `value`."""
    known_names = {name.lower(): name for name in known}
    return known_names.get(value.lower()) or _TABLES["schedule_classes"].get(value.lower(), value)


def renamed_key(old: str) -> str | None:
    """The current name of a key of an older release; None if it was not renamed."""
    table, _, key = old.partition(".")
    if table in MOVED_TABLES and key and old not in RENAMED:
        return f"{MOVED_TABLES[table]}.{key}"
    return RENAMED.get(old)


def started_with(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each key of `OLD_DEFAULTS` in the run that saved a checkpoint.

    Args:
        saved: the contents of the checkpoint except its tensors; "config" is the configuration as nested tables. Values
            are not checked: a damaged or foreign checkpoint may contain anything.

    Returns:
        Values by key; empty if the checkpoint has no configuration. Keys of a converter only if the run had it.
    """
    config = saved.get("config")
    if not isinstance(config, Mapping):
        return {}
    values = {key: value_in(config, key, default) for key, default in OLD_DEFAULTS.items()}
    converters = value_in(config, "model.converters", ())
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if not key.startswith("quantize.") or (isinstance(converters, list) and key.rpartition(".")[0] in converters)
    }


def value_in(config: Any, key: str, default: Any) -> Any:
    """The value of a key in a configuration of nested tables, else `default`. `config` may be any value."""
    *tables, name = key.split(".")
    table: Any = config
    for each in tables:
        table = table.get(each, {}) if isinstance(table, Mapping) else {}
    return table.get(name, default) if isinstance(table, Mapping) else default
