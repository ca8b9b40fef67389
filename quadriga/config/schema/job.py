"""[job] and [experimental]: the run itself, and the keys through which other trainers import user code."""

from __future__ import annotations

from quadriga.config.schema.section import Name, Section


class Job(Section):
    """The run: its name, and the folder that everything is written to."""

    config_file: str | None = None
    """The TOML file to read; given on the command line."""

    dump_folder: Name = "./outputs"
    """The run folder: everything a run writes lies under it. Relative to the folder the run is started from."""

    description: str = "default job"
    """Free text, shown at the start of the run and at the top of the card."""

    print_config: bool = False
    """Print the resolved configuration at the start."""

    save_config_file: str | None = None
    """Write the resolved configuration as JSON too, under this name in the run folder."""

    custom_config_module: str = ""
    """Not available: user code enters through the Python API. Must stay empty."""


class Experimental(Section):
    """Keys through which other trainers import user code; here that is what the Python API is for."""

    custom_import: str = ""
    """Not available: user code enters through the Python API. Must stay empty."""

    custom_args_module: str = ""
    """Not available: user code enters through the Python API. Must stay empty."""
