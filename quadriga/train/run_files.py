"""Describes a run in its folder: the resolved configuration, the environment and the estimate."""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import quadriga
from quadriga.comm.backend import backend_by_axis
from quadriga.config import JobConfig, Run, to_toml
from quadriga.config.run_spec import Degrees
from quadriga.hardware import find_device
from quadriga.metrics.append import set_aside
from quadriga.metrics.guarded import WriteFailures
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
        "libraries": {name: version for name in LIBRARIES if (version := installed_version(name))},
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


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Quadriga, Python and the libraries that affect the numbers."""
    libraries = {name: version for name in LIBRARIES if (version := installed_version(name))}
    return {"quadriga": quadriga.__version__, "python": platform.python_version(), **libraries}


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
