"""Runs a row of the table through the launcher, as a user would, and compares it with its reference."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import quadriga
from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.models.registry import catalogue, parallel_plan
from quadriga.rehearsal.equivalence.compare import OutcomeDifferences, RunOutcome, compare_outcomes, read_outcome
from quadriga.rehearsal.equivalence.rows import SECTIONS, STEPS, TOLERANCES, Keys, Row, format_arguments

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
