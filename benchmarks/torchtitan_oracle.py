"""torchtitan v0.2.2 as the oracle of `fidelity.py` and `continue_torchtitan.py`: runs on one rank of a CPU, in a
separate environment.

The package cannot be in Quadriga's environment: it needs other versions of datasets and tokenizers, and the repository
has a folder with its name.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BENCHMARKS, RESULTS, require_clean_tree
from trainer import environment, output_tail

DRIVER = BENCHMARKS / "torchtitan_on_cpu.py"
NEEDED = {"torchtitan": "0.2.2", "torch": "2.13.0"}
# In sequence, so that the second does not choose another torch. triton is imported, but not needed on a CPU.
INSTALLS = (["torch==2.13.0"], ["torchtitan==0.2.2", "safetensors"], ["--no-deps", "triton"])
TIMEOUT_SECONDS = 1800.0  # limit of one training run, far above its expected time


class OracleMissing(Exception):
    """The package is missing and cannot be installed; the message has the reason and a remedy."""


@dataclass(frozen=True)
class Oracle:
    python: Path
    versions: Mapping[str, str]

    def train(self, start_folder: Path, record: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
        """Train from `start_folder`, and return the records of `torchtitan_on_cpu.py`. Raises SystemExit on failure."""
        with tempfile.TemporaryDirectory(prefix="torchtitan-cache-") as caches:
            own = {"HF_HOME": caches, "HF_HUB_OFFLINE": "1"}
            own |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            done = self._run(["train", str(record), *arguments], own, start_folder)
        if done.returncode != 0:
            raise SystemExit(f"torchtitan failed with exit code {done.returncode}:\n{output_tail(done.stderr, 25)}")
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]

    def defaults(self) -> str:
        """Its JobConfig with every default, as TOML."""
        done = self._run(["defaults"], {}, BENCHMARKS)
        if done.returncode != 0:
            raise SystemExit(f"torchtitan did not print its defaults:\n{output_tail(done.stderr)}")
        return done.stdout

    def _run(self, arguments: Sequence[str], own: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
        environ = {**without_python_path(environment(1, "cpu")), **own}
        command = [str(self.python), "-P", str(DRIVER), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )


def without_python_path(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without Python paths, because the repository has a folder `torchtitan`."""
    return {name: value for name, value in environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def read_arguments(
    parser: argparse.ArgumentParser, steps: int, names: Sequence[str]
) -> tuple[argparse.Namespace, Oracle, list[str]]:
    """The parsed arguments, the oracle, and the chosen ones of `names`. Adds the arguments that all scripts have.

    `steps`: default of --steps. Raises SystemExit before any work if the tree is not clean, or there is no oracle.
    """
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--oracle", type=Path, metavar="PYTHON", help="Python of an environment with torchtitan 0.2.2")
    where.add_argument("--cache", type=Path, metavar="FOLDER", help="create such an environment in here, or reuse it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"those whose name begins so: {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the result")
    chosen = parser.parse_args()
    found = [name for name in names if not chosen.only or name.startswith(tuple(chosen.only))]
    if not found:
        parser.error("--only matches no name")
    if chosen.out == RESULTS:
        require_clean_tree()  # before the work, not after it
    try:
        return chosen, find_oracle(chosen.oracle.absolute()) if chosen.oracle else build_oracle(chosen.cache), found
    except OracleMissing as reason:
        raise SystemExit(str(reason)) from None


def find_oracle(python: Path) -> Oracle:
    """The oracle in the environment of `python`. Raises OracleMissing if it cannot run, or has other versions."""
    try:
        done = subprocess.run(
            [str(python), "-P", str(DRIVER), "versions"],
            env=without_python_path(os.environ),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
    except OSError as error:
        raise OracleMissing(f"{python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise OracleMissing(f"{python} does not have torchtitan: {output_tail(done.stderr, 1)}")
    versions: dict[str, str] = json.loads(done.stdout)
    for name, needed in NEEDED.items():
        if versions[name].partition("+")[0] != needed:
            raise OracleMissing(f"{python} has {name} {versions[name]}; {needed} is required")
    return Oracle(python, versions)


def build_oracle(cache: Path) -> Oracle:
    """The oracle in the environment `cache`/torchtitan-0.2.2, which is created if it is missing or incomplete.

    Raises OracleMissing if venv or pip fails, with the end of their output.
    """
    folder = cache.resolve() / f"torchtitan-{NEEDED['torchtitan']}"
    python = folder / "bin" / "python"
    try:
        return find_oracle(python)
    except OracleMissing:
        print(f"creating the environment of torchtitan in {folder} ...", file=sys.stderr, flush=True)
    _install([sys.executable, "-m", "venv", str(folder)])
    for packages in INSTALLS:
        _install([str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages])
    return find_oracle(python)


def _install(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=without_python_path(os.environ), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = output_tail(done.stderr or done.stdout, 4)
        fix = "give --oracle PYTHON of an environment with torchtitan"
        raise OracleMissing(f"torchtitan cannot be installed; {fix}\n$ python {' '.join(command[1:])}\n{tail}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
