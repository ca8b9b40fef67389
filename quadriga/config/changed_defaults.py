"""Keys whose default has changed, with their old default, for runs that were started before the change.

For each of these keys that the user does not set, a resumed run keeps the value that it was started with: that of the
configuration in its checkpoint, or the old default if the key did not exist then.

A change of a default on which the numbers of a training depend needs a line here. A new key whose default does not
change training needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_DEFAULTS: Mapping[str, Any] = {
    "lr_scheduler.variant": "early_decay",
    "optimizer.decay_norms_and_biases": False,
}


def started_with(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each key of `OLD_DEFAULTS` in the run that saved a checkpoint.

    Args:
        saved: the contents of the checkpoint except its tensors; "config" is the configuration as nested tables. Values
            are not checked: a damaged or foreign checkpoint may contain anything.

    Returns:
        Values by key; empty if the checkpoint has no configuration.
    """
    config = saved.get("config")
    if not isinstance(config, Mapping):
        return {}
    return {key: value_in(config, key, default) for key, default in OLD_DEFAULTS.items()}


def value_in(config: Any, key: str, default: Any) -> Any:
    """The value of a key in a configuration of nested tables, else `default`. `config` may be any value."""
    *tables, name = key.split(".")
    table: Any = config
    for each in tables:
        table = table.get(each, {}) if isinstance(table, Mapping) else {}
    return table.get(name, default) if isinstance(table, Mapping) else default
