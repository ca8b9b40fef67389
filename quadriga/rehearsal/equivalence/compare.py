"""Compares two finished runs of one configuration: every loss, every gradient norm, and the final weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quadriga.checkpoint import load
from quadriga.checkpoint.folder import published_path
from quadriga.metrics.jsonl import read_metrics
from quadriga.models.plan import ParameterPlan


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
