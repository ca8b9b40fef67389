"""Runs a row of the table through the launcher, as a user would, and compares it with its reference: every loss, every
gradient norm, and the final weights."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import quadriga
from quadriga.checkpoint import load
from quadriga.checkpoint.folder import published_path
from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.metrics.jsonl import read_metrics
from quadriga.models.plan import ParameterPlan
from quadriga.models.registry import catalogue, parallel_plan
from quadriga.rehearsal.equivalence.rows import SECTIONS, STEPS, TOLERANCES, Keys, Row, format_arguments


@dataclass(frozen=True)
class RunOutcome:
    """Results of a run: loss and gradient norm of each step, and weights by name, on the host in float32."""

    losses: list[float]
    grad_norms: list[float]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class OutcomeDifferences:
    """The largest relative differences between two runs; see `rows.TOLERANCES`."""

    loss: float
    grad_norm: float
    weights: float
    weights_of: str  # the parameter that differs most

    def within(self, tolerance: Mapping[str, float]) -> bool:
        return all(asdict(self)[name] <= limit for name, limit in tolerance.items())


def read_outcome(folder: Path, parameters: Iterable[ParameterPlan], steps: int) -> RunOutcome:
    """Read the results of steps 1 to `steps` from a run folder. Raises ValueError if a step is missing."""
    records = read_metrics(folder / "metrics.jsonl")
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        raise ValueError(f"{folder}: not every step from 1 to {steps} is in metrics.jsonl")
    weights = {plan.name: torch.empty(plan.shape) for plan in parameters}
    saved = {f"model.{name}": tensor for name, tensor in weights.items()}
    load.load_tensors(published_path(folder / "checkpoint", steps), saved, None)
    return RunOutcome([record["loss"] for record in records], [record["grad_norm"] for record in records], weights)


def compare_outcomes(run: RunOutcome, reference: RunOutcome) -> OutcomeDifferences:
    """The largest differences of `run` from `reference`, relative to `reference`."""
    differences = {
        name: ((run.weights[name] - weight).norm() / weight.norm()).item() for name, weight in reference.weights.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return OutcomeDifferences(
        loss=_max_relative_difference(run.losses, reference.losses),
        grad_norm=_max_relative_difference(run.grad_norms, reference.grad_norms),
        weights=differences[worst],
        weights_of=worst,
    )


def _max_relative_difference(values: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))


LAST_LINES = 15  # of a failed run's output

Train = Callable[[Path, int, Sequence[str]], None]  # run folder, ranks, command line


class RunFailed(Exception):
    """A row's run failed; the message is the end of its output."""


@dataclass(frozen=True)
class RowResult:
    row: Row
    differences: OutcomeDifferences | None  # None: the run failed
    seconds: float
    why: str = ""

    @property
    def met(self) -> bool:
        return self.differences is not None and self.differences.within(self.row.tolerance)


@dataclass
class Trials:
    """Runs rows in `folder`, and the reference process of each set of model keys once.

    `train` runs one training to its end, or raises `RunFailed`. `extra_keys` are arguments of every run.
    """

    folder: Path
    train: Train
    extra_keys: Sequence[str] = ()
    _baselines: dict[Keys, RunOutcome] = field(default_factory=dict)

    def run(self, row: Row) -> RowResult:
        start = time.perf_counter()
        try:
            differences = compare_outcomes(self._outcome(row), self.baseline(row))
        except (RunFailed, ValueError) as error:
            return RowResult(row, None, time.perf_counter() - start, str(error))
        return RowResult(row, differences, time.perf_counter() - start)

    def baseline(self, row: Row) -> RunOutcome:
        """Results of the reference process for the row's model."""
        if row.model not in self._baselines:
            self._baselines[row.model] = self._outcome(row.one_rank())
        return self._baselines[row.model]

    def _outcome(self, row: Row) -> RunOutcome:
        """Train and read the results. The run folder, with its checkpoint, is deleted."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            command = [*format_arguments(row.keys()), *self.extra_keys, "--job.dump_folder", folder]
            run = read(command, {}, catalogue=catalogue(), backends=BACKENDS, world_size=row.ranks, training=True)
            self.train(Path(folder), row.ranks, command)
            return read_outcome(Path(folder), parallel_plan(run.spec.model).parameters, STEPS)


def train_with_launcher(folder: Path, ranks: int, command: Sequence[str]) -> None:
    """Train in separate processes without output. Raises RunFailed with the end of their output."""
    environ = {**os.environ, "NGPU": str(ranks), "LOG_RANK": "0"}
    for name in ("CONFIG_FILE", "DRY_RUN", "NNODES", "NODE_RANK", "RDZV_ENDPOINT"):
        environ.pop(name, None)
    started = [sys.executable, "-m", "quadriga.launch", *command]
    done = subprocess.run(started, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailed("\n".join(done.stderr.strip().splitlines()[-LAST_LINES:]))


def summarize_results(results: Sequence[RowResult], command: str) -> dict[str, Any]:
    """The figures of all rows for a result file, with command, device and versions."""
    return {
        "benchmark": "equivalence",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"quadriga": quadriga.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "tolerance": TOLERANCES,
        "rows": [
            {
                "section": next((name for name, rows in SECTIONS.items() if result.row in rows), ""),
                "layout": result.row.name,
                "ranks": result.row.ranks,
                "met": result.met,
                "seconds": round(result.seconds, 1),
                **(asdict(result.differences) if result.differences else {"failed": result.why}),
            }
            for result in results
        ],
    }
