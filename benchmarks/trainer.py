"""Starts the trainer from a benchmark: writes a TOML file into a temporary folder, and builds the commands."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import BENCHMARKS, child_environment, usable_cores
from paired import TimedCommand
from shapes import BETAS, EPS, LR, MAX_NORM, WEIGHT_DECAY, Shape

STEP_LINE = r"\bstep +\d+/\d+ +loss"  # of Quadriga's console
BARE_STEP_LINE = r"^step \d+ loss"

Tables = Mapping[str, Mapping[str, Any]]


def write_toml(path: Path, tables: Tables) -> Path:
    """Write tables of strings, numbers and booleans. A table's name may have dots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(table[key])}\n" for key in table)
        for name, table in tables.items()
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def matching_config(shape: Shape, dtype: str, ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration that trains what `bare.py` trains: same sizes, dtypes, batch and optimizer, without recompute.

    All else has its default: real text is read and tokenized, and every step is measured, logged and written to
    metrics.jsonl (`log_freq = 1`, so that each step is visible).
    """
    return {
        "job": {"dump_folder": str(folder / "run"), "description": "benchmark"},
        "model": {
            "flavor": "debugmodel",
            "hf_assets_path": "builtin:bytes",
            **{
                name: getattr(shape, name)
                for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
            },
        },
        "training": {
            "dataset": "builtin",
            "local_batch_size": shape.batch // ranks,
            "global_batch_size": shape.batch,
            "seq_len": shape.seq_len,
            "steps": 1_000_000,
            "max_norm": MAX_NORM,
            "dtype": dtype,
            "mixed_precision_param": dtype,
            "mixed_precision_reduce": dtype,
        },
        "optimizer": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY},
        "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
        "activation_checkpoint": {"mode": "none"},
        "metrics": {"log_freq": 1},
    }


def trainer_command(config_file: Path, ranks: int, device: str, *overrides: str) -> TimedCommand:
    """The whole trainer: `python -m quadriga.train` for one rank, the launcher with torchrun for several."""
    module = "quadriga.train" if ranks == 1 else "quadriga.launch"
    argv = [sys.executable, "-m", module, "--job.config_file", str(config_file), *overrides]
    return TimedCommand("quadriga", argv, STEP_LINE, environment(ranks, device))


def bare_command(ranks: int, device: str, *arguments: str) -> TimedCommand:
    """The reference loop, as one process or under torchrun."""
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *starter, str(BENCHMARKS / "bare.py"), "--device", device, *arguments]
    return TimedCommand("bare PyTorch", argv, BARE_STEP_LINE, environment(ranks, device))


def environment(ranks: int, device: str) -> dict[str, str]:
    """The environment of both sides: the cores are divided among the ranks (unless OMP_NUM_THREADS is set), and gloo
    uses the loopback interface.

    GNU OpenMP threads spin only briefly while they wait (GOMP_SPINCOUNT). With more threads than cores, spinning would
    slow both sides several times.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    spins = os.environ.get("GOMP_SPINCOUNT", "2000")
    chosen = {"NGPU": str(ranks), "OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": spins}
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        chosen["GLOO_SOCKET_IFNAME"] = loopback.pop()
    if device == "cpu":
        chosen |= {"CUDA_VISIBLE_DEVICES": "", "COMM_BACKEND": "gloo"}
    return child_environment(**chosen)


def run_quadriga(folder: Path, ranks: int, module: str, *arguments: str) -> None:
    """Run a module of Quadriga in a folder, on a CPU. Raises SystemExit with the end of its output if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    environ = environment(ranks, "cpu")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = output_tail(done.stderr, 25)
        raise SystemExit(f"{' '.join(command[1:])} failed with exit code {done.returncode}:\n{tail}")


def output_tail(output: str, lines: int = 15) -> str:
    """The end of a failed command's output, for an error message."""
    return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()[-lines:])
