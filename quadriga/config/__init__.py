"""Configuration: one TOML file, strictly read. `read` is the entry; the sections are in `quadriga.config.schema`."""

from __future__ import annotations

from quadriga.config.keys import to_toml
from quadriga.config.read import Run, read
from quadriga.config.run_spec import RunSpec
from quadriga.config.schema import JobConfig

__all__ = ["JobConfig", "Run", "RunSpec", "read", "to_toml"]
