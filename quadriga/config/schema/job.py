"""[job] and [experimental]: the run itself, and torchtitan's keys that import user code."""

from __future__ import annotations

from quadriga.config.schema.section import Name, Section


class Job(Section):
    """The run: its description, and its folder."""

    config_file: str | None = None
    """The TOML file to read. Only on the command line."""

    dump_folder: Name = "./outputs"
    """The run folder, for everything that a run writes. Relative to the directory that the run is started from."""

    description: str = "default job"
    """Free text, printed at the start of the run and at the top of the card."""

    print_config: bool = False
    """Print the resolved configuration at the start."""

    save_config_file: str | None = None
    """Also write the resolved configuration as JSON, to this name in the run folder."""

    custom_config_module: str = ""
    """Not available, must be empty. Use your own code through the Python API."""


class Experimental(Section):
    """torchtitan's keys that import user code. In Quadriga, use the Python API."""

    custom_import: str = ""
    """Not available, must be empty. Use your own code through the Python API."""

    custom_args_module: str = ""
    """Not available, must be empty. Use your own code through the Python API."""
