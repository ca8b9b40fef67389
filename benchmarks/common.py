"""Shared parts of the benchmarks: paths, machine and versions, result files, text tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
LIBRARIES = ("torch", "numpy", "tokenizers")

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # only the requirements must be installed

import quadriga  # noqa: E402 (the import is fast; it does not load torch)


def child_environment(**extra: str) -> dict[str, str]:
    """Environment of a child process: it finds the package from any folder, and does not buffer its output.

    Bytecode is kept, as Python does by default. Without it, each start would compile the package anew.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **extra}


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(" (UUID")[0] for line in listed.stdout.splitlines()]


def describe_versions() -> dict[str, str]:
    versions = {"quadriga": quadriga.__version__, "commit": git("rev-parse", "--short", "HEAD") or "unknown"}
    return {**versions, "python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}


def git(*arguments: str) -> str:
    """The output of git in this repository; empty if there is no repository or git fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# The folders that each script measures. A result is outdated if one of them has changed.
_TRAINING = ("train", "resilience", "models", "optim", "parallel", "comm", "data", "metrics")
_PLANNING = ("planning", "models", "config", "hardware.py")
MEASURES: dict[str, tuple[str, ...]] = {
    "attention": ("planning",),
    "bench_debug": (*_TRAINING, "analysis/compare"),
    "continue_torchtitan": (*_TRAINING, "config", "cli"),
    "cpu_table": _TRAINING,
    "cuda_dispatch": (*_TRAINING, "planning", "config", "rehearsal/live_memory.py"),
    "data_speed": ("data",),
    "equality": _TRAINING,
    "equivalence": (*_TRAINING, "rehearsal/equivalence"),
    "estimates": _PLANNING,
    "fidelity": (*_TRAINING, "config"),
    "hta": ("metrics", "comm"),
    "kill_matrix": ("train", "resilience", "checkpoint", "data", "launch"),
    "plan_speed": ("checkpoint",),
    "save_cost": ("checkpoint", "train", "resilience"),
    "loss_speed": ("train",),
    "document_attention": ("parallel", "models"),
    "scaling": (*_TRAINING, "planning", "rehearsal"),
    "search": _PLANNING,
    "shakespeare": _TRAINING,
    "speed": _TRAINING,
    "startup": (*_TRAINING, "cli", "launch", "config", "planning"),
    "step_time": (*_TRAINING, "planning"),
    "trace_speed": ("analysis/trace",),
}
WHOLE_PACKAGE = ("",)  # for scripts that the table does not name


def measured_folders(script: str, commit: str = "HEAD") -> dict[str, str]:
    """The folders that a script measures, each with its git hash at `commit` (empty: unknown)."""
    folders = [f"quadriga/{name}".rstrip("/") for name in MEASURES.get(script, WHOLE_PACKAGE)]
    return {folder: git("rev-parse", f"{commit}:{folder}") for folder in folders}


def require_clean_tree() -> None:
    """Raise SystemExit with the names of the files if the tree has uncommitted changes.

    A figure belongs to a commit. Results, pages and README may have changed, because several results are saved in a
    row.
    """
    if changed := git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md"):
        raise SystemExit(f"results are saved from a clean commit; not committed:\n{changed}")


def save(name: str, figures: Any, *, command: Sequence[str], claim: str, folder: Path = RESULTS) -> Path:
    """Write results/`name`.json. `command`: the command line, without local folders.

    Raises SystemExit if `folder` is `RESULTS` and the tree has uncommitted changes.
    """
    if folder == RESULTS:
        require_clean_tree()
    script = Path(" ".join(command).split()[1]).stem if len(" ".join(command).split()) > 1 else name
    result = {
        "benchmark": name,
        "claim": claim,
        "command": " ".join(command),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "measures": measured_folders(script),
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def command_line() -> list[str]:
    """`python benchmarks/NAME.py ...`, with only the last part of each path."""
    script, *arguments = sys.argv
    shown = [Path(part).name if os.sep in part else part for part in arguments]
    return ["python", f"benchmarks/{Path(script).name}", *shown]


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def met_or_missed(met: bool) -> str:
    return "met" if met else "MISSED"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile. All are equal for a single value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
