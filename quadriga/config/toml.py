"""A configuration as TOML again: reading it back gives the same configuration."""

from __future__ import annotations

from typing import Any

import tomli_w

from quadriga.config.schema import JobConfig


def to_toml(config: JobConfig) -> str:
    """Every key with its value, defaults included; an optional key that is off is written as `"none"`."""
    tables = config.model_dump(mode="json")
    del tables["job"]["config_file"]  # where it was read from is no part of what it says
    header = "# The configuration as resolved: every key with the value that counts.\n\n"
    return header + tomli_w.dumps(_without_none(tables))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items()}
    return "none" if value is None else value
