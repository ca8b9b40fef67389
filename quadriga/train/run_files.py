"""Describes a run in its folder: the resolved configuration, the environment, the estimate, and the start in the event
log, which numbers it."""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import quadriga
from quadriga.comm import collectives
from quadriga.comm.backend import backend_by_axis
from quadriga.config import JobConfig, Run, to_toml
from quadriga.config.run_spec import Degrees, RunSpec
from quadriga.errors import UserError
from quadriga.hardware import find_device
from quadriga.json_collectives import broadcast_json
from quadriga.log import logger
from quadriga.metrics.append import ensure_appendable, set_aside
from quadriga.metrics.events import EVENTS_NAME, EventLog, process_start_time
from quadriga.metrics.guarded import WriteFailures
from quadriga.metrics.jsonl import next_attempt
from quadriga.metrics.loggers import JSONL_NAME
from quadriga.planning.advice import advice_for, format_memory_savings
from quadriga.planning.estimate import estimate

LIBRARIES = ("torch", "numpy", "pydantic", "tokenizers", "tiktoken", "datasets", "safetensors", "tensorboard")
VARIABLES = (
    "COMM_BACKEND",
    "NVSHMEM_SYMMETRIC_SIZE",
    "NNODES",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
    "LOG_RANK",
)


def write_config_and_environment(
    folder: Path, config: JobConfig, backend: str, degrees: Degrees, device: torch.device, failures: WriteFailures
) -> None:
    """Write `config.toml`, `environment.json` and, on request, the configuration as JSON into the run folder."""
    files = {"config.toml": to_toml(config)}
    if config.job.save_config_file is not None:
        files[config.job.save_config_file] = config.model_dump_json(indent=2) + "\n"
    files["environment.json"] = json.dumps(describe_environment(backend, degrees, device), indent=2) + "\n"
    for name, text in files.items():
        _write(folder / name, text, failures)


def _write(path: Path, text: str, failures: WriteFailures) -> None:
    """Replace a file atomically. Anything else at the path is removed (also a FIFO), or set aside (a folder)."""
    draft = path.with_name(f".{path.name}.draft")
    with failures.tolerated(str(path)):
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.unlink(missing_ok=True)
            draft.write_text(text, encoding="utf-8")
            if path.is_dir() and not path.is_symlink():
                set_aside(path, "a folder")
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


def write_estimate(folder: Path, run: Run, device: torch.device, attempt: int, failures: WriteFailures) -> None:
    """Write `estimate.json`: predicted memory, communication and step time of this run on its device.

    A copy for this start of the run goes to `estimates/attempt-N.json`, so that the traces of this start can still be
    compared with it after a resume on another layout.
    """
    known = find_device(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    predicted = estimate(run, known)
    content = predicted.to_dict([each.to_dict() for each in advice_for(predicted)])
    content |= {"attempt": attempt, "if_memory_runs_out": format_memory_savings(predicted)}
    for path in (folder / "estimates" / f"attempt-{attempt}.json", folder / "estimate.json"):
        _write(path, json.dumps(content, indent=2) + "\n", failures)


def describe_environment(backend: str, degrees: Degrees, device: torch.device) -> dict[str, Any]:
    """Versions, devices, git commit and command, to reproduce the run later.

    A run that computes on a CPU does not query GPUs, because that would initialize CUDA."""
    on_cuda = device.type == "cuda"
    return {
        "quadriga": quadriga.__version__,
        "git": git_state(),
        "command": sys.argv,
        "python": platform.python_version(),
        "libraries": library_versions(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if on_cuda else 0)],
        "cpu": {
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads_per_rank": torch.get_num_threads(),
        },
        "host": socket.gethostname(),
        "system": platform.platform(),
        "world_size": degrees.world_size,
        "backend": backend,
        "backends": backend_by_axis(backend, degrees),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Quadriga, Python and the libraries that shape the numbers."""
    return {"quadriga": quadriga.__version__, "python": platform.python_version(), **library_versions()}


@functools.cache
def library_versions() -> dict[str, str]:
    """Of the installed ones of LIBRARIES."""
    found = {}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            if version := metadata.version(name):  # None where the metadata of a package is damaged
                found[name] = version
    return found


def git_state() -> dict[str, Any] | None:
    """The commit, and whether the tree has changes; None outside a checkout."""
    root = Path(quadriga.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit, changed = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    return {"commit": commit, "changed": bool(changed)} if commit else None


def git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def open_event_log(spec: RunSpec, backend: str) -> EventLog:
    """Number this start of the run, and log it. Call on all ranks after the process group is initialized."""
    folder = Path(spec.folders.dump)
    if collectives.rank() != 0:
        return EventLog(folder, collectives.rank(), broadcast_json(None))
    # The first rank decides, because it alone writes the two files that give the number. Both are read: a start may
    # have ended before its first metrics, another one before its first event.
    attempt = max(_next_attempt(folder / name) for name in (JSONL_NAME, EVENTS_NAME))
    events = EventLog(folder, 0, broadcast_json(attempt))
    facts = {"world_size": spec.world_size, "layout": asdict(spec.degrees), "backend": backend}
    events.log_event("start", 0, **facts, process_start=process_start_time())
    return events


def _next_attempt(path: Path) -> int:
    """The number after that of the last start in the file; 1 if the file is not readable, which is then set aside."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ensure_appendable(path)
        return next_attempt(path)
    except (OSError, UserError) as error:
        logger.warning("%s cannot be read: the starts of this run are numbered from 1 again (%s)", path, error)
        return 1
