"""Published runs (`published_runs.toml`): their sides, their predicted speeds, and the fit of `planning.rates.FITTED`.

The side of a row is the first hexadecimal digit of SHA-256 of `page|table|row`: even = fit, odd = held out. Constants
are fitted to rows of the fit side alone. `python benchmarks/estimates.py` reports the errors.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common import BENCHMARKS, ROOT

sys.path.insert(0, str(ROOT / "tests"))  # configurations are read as in the tests

from estimating import run_of

from quadriga.config import Run
from quadriga.hardware import Device, device_named
from quadriga.planning.estimate import Estimate, estimate
from quadriga.planning.rates import FITTED

BASE = (
    *("--model.hf_assets_path=x", "--training.seq_len=8192", "--training.dtype=float32"),
    *("--training.mixed_precision_param=bfloat16", "--training.mixed_precision_reduce=float32"),
)
# Where a fit starts, and the bounds of each constant. `float8` and `async_tp` are not fitted. The B200 is one machine
# with a power limit that is not published, so its share is not part of the product.
START = {
    **dict.fromkeys(("A100", "H100 96GB", "H200", "B200"), (0.7, 0.2, 0.95)),
    "float8_rowwise": (1.5, 1.0, 2.0),
    "imbalance": (0.5, 0.0, 1.5),
    "attention": (300.0, 200.0, 350.0),
    "eager": (2.0, 1.0, 6.0),
    "overlap": (5.0, 2.0, 12.0),
}
ROUNDS = 40


@dataclass(frozen=True)
class PublishedRun:
    """A row. `speed`: tokens/s per GPU. `memory`: GiB reserved, None if not published. `fits_memory`: the two factors
    of reserved memory are fitted to it. `limit`: of the power, as published."""

    page: str
    table: str
    row: str
    name: str
    device: Device
    limit: str
    ranks: int
    speed: float
    settings: tuple[str, ...]
    memory: float | None = None
    fits_memory: bool = False

    @property
    def is_fit(self) -> bool:
        digit = hashlib.sha256(f"{self.page}|{self.table}|{self.row}".encode()).hexdigest()[0]
        return int(digit, 16) % 2 == 0

    @cached_property
    def run(self) -> Run:
        arguments = {each.partition("=")[0]: each for each in (*BASE, *self.settings)}  # the last of a key wins
        return run_of(*arguments.values(), ranks=self.ranks, base=())

    def predicted(self) -> Estimate:
        return estimate(self.run, self.device)

    def error(self) -> float:
        """Predicted speed relative to the published one, less 1."""
        speed = self.predicted().tokens_per_second_per_device
        assert speed is not None
        return speed / self.speed - 1


def published_runs() -> tuple[list[PublishedRun], list[PublishedRun]]:
    """The rows with PyTorch's kernels, and those of other systems."""
    document = tomllib.loads((BENCHMARKS / "published_runs.toml").read_text(encoding="utf-8"))

    def of(row: Mapping[str, Any], page: Mapping[str, Any]) -> PublishedRun:
        device = device_named(row.get("device", page.get("device")), "device")
        known = {key: row[key] for key in ("name", "ranks", "speed", "memory", "fits_memory") if key in row}
        labels = {key: row.get(key, row.get("source", "")) for key in ("page", "table", "row")}
        settings = (*page.get("settings", ()), *row["settings"])
        return PublishedRun(
            **labels, **known, device=device, limit=row.get("limit", page.get("limit", "")), settings=settings
        )

    return [of(row, document["pages"][row["page"]]) for row in document["rows"]], [
        of(row, {}) for row in document["others"]
    ]


def summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = [abs(error) for error in errors]
    return {"rows": len(sizes), "median": statistics.median(sizes), "worst": max(sizes)}


def fit(runs: Sequence[PublishedRun]) -> dict[str, float]:
    """The constants that minimize the errors of `runs`, by coordinate descent. Sets them in `FITTED`."""
    step = dict.fromkeys(START, 0.15)
    FITTED.update({name: start for name, (start, _, _) in START.items()})
    least = _loss(runs)
    for _ in range(ROUNDS):
        for name, (start, low, high) in START.items():
            before, change = FITTED[name], step[name] * start
            for value in (before + change, before - change):
                FITTED[name] = min(max(value, low), high)
                if (loss := _loss(runs)) < least - 1e-9:
                    least = loss
                    break
            else:
                FITTED[name], step[name] = before, step[name] / 2
    return {name: FITTED[name] for name in START}


def _loss(runs: Sequence[PublishedRun]) -> float:
    """Between the sum of errors and the sum of their squares: a single odd row weighs less than with squares."""
    return sum(abs(math.log1p(run.error())) ** 1.5 for run in runs)


def without_each_page(runs: Sequence[PublishedRun]) -> dict[str, dict[str, float]]:
    """By page: the errors of its rows with constants that are fitted without the page."""
    found = {}
    for page in dict.fromkeys(run.page for run in runs):
        fit([run for run in runs if run.is_fit and run.page != page])
        found[page] = {run.name: run.error() for run in runs if run.page == page}
    return found
