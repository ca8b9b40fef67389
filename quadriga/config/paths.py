"""Expands `~` and `$VARIABLES` in the keys that name files and folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quadriga.errors import Problem, nearest

PATHS = frozenset(
    {
        "checkpoint.folder",
        "checkpoint.initial_load_path",
        "comm.save_traces_folder",
        "estimate.device",
        "job.config_file",
        "job.dump_folder",
        "job.save_config_file",
        "metrics.save_tb_folder",
        "model.hf_assets_path",
        "parallelism.pipeline_parallel_schedule_csv",
        "profiling.save_memory_snapshot_folder",
        "profiling.save_traces_folder",
        "training.dataset_path",
        "validation.dataset_path",
    }
)
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand(where: str, text: str, source: str | None, environ: Mapping[str, str]) -> str | Problem:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced; a problem if one of them is not defined."""
    for match in _VARIABLE.finditer(text):
        name = match.group(1) if match.group(1) is not None else match.group(2)
        if not _NAME.fullmatch(name):
            return Problem(where, f"`{match.group()}` is not a variable", text, source, "$NAME or ${NAME}")
        if name not in environ:
            fix = f"export {name}, or write the path itself"
            what = f"the environment variable {name} is not set"
            return Problem(where, what, text, source, nearest=nearest(name, environ), fix=fix)
    expanded = _VARIABLE.sub(lambda match: environ[match.group(1) or match.group(2)], text)
    if not expanded.startswith("~"):
        return expanded
    home, slash, rest = expanded.partition("/")
    if home == "~" and environ.get("HOME"):
        return environ["HOME"] + slash + rest
    try:
        return str(Path(home).expanduser()) + slash + rest
    except RuntimeError:
        return Problem(where, f"there is no home folder for `{home}`", text, source, fix="write the path itself")
