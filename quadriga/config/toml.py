"""Writes a configuration as TOML. Reading it gives the same configuration."""

from __future__ import annotations

from typing import Any

import tomli_w

from quadriga.config.schema import JobConfig


def to_toml(config: JobConfig) -> str:
    """Every key with its value, including defaults. An optional key that is off is written as `"none"`."""
    tables = config.model_dump(mode="json")
    del tables["job"]["config_file"]  # the path that it was read from is not part of the configuration
    header = "# The resolved configuration: every key with its effective value.\n\n"
    return header + tomli_w.dumps(_without_none(tables))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items()}
    return "none" if value is None else value
