"""Keys whose default has changed since runs were started that may still go on, with the default that they had.

A run that resumes keeps, for each of these keys that the user does not set, the value that it was started with: the one
in the configuration that its checkpoint holds, or the old default where the key did not exist yet.

To change a default on which the numbers of a training depend means to add a line here. A key that is new and whose
default leaves training as it was needs none.
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
        saved: what the checkpoint holds beside its tensors; its "config" is the configuration as nested tables. Values
            are as they were found: a damaged or foreign checkpoint may hold anything.

    Returns:
        Values by key; none where the checkpoint holds no configuration.
    """
    config = saved.get("config")
    if not isinstance(config, Mapping):
        return {}
    return {key: value_in(config, key, default) for key, default in OLD_DEFAULTS.items()}


def value_in(config: Any, key: str, default: Any) -> Any:
    """The value of a key in a configuration as nested tables, or what a checkpoint holds in its place."""
    *tables, name = key.split(".")
    table: Any = config
    for each in tables:
        table = table.get(each, {}) if isinstance(table, Mapping) else {}
    return table.get(name, default) if isinstance(table, Mapping) else default
