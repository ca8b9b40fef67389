"""Two finished runs of one configuration, side by side: every loss, every gradient norm, and the final weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quadriga.checkpoint import tensors
from quadriga.checkpoint.folder import published_path
from quadriga.metrics.jsonl import read_metrics
from quadriga.models.plan import ParameterPlan


@dataclass(frozen=True)
class RunOutcome:
    """What a run left: a loss and a gradient norm a step, and the weights by name, on the host in float32."""

    losses: list[float]
    grad_norms: list[float]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class OutcomeDifferences:
    """The greatest relative differences between two runs; see `rows.TOLERANCES`."""

    loss: float
    grad_norm: float
    weights: float
    weights_of: str  # the parameter that differs most

    def within(self, tolerance: Mapping[str, float]) -> bool:
        return all(asdict(self)[name] <= limit for name, limit in tolerance.items())


def read_outcome(folder: Path, parameters: Iterable[ParameterPlan], steps: int) -> RunOutcome:
    """Read a run folder. Raises ValueError where a step is missing in it."""
    records = read_metrics(folder / "metrics.jsonl")
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        raise ValueError(f"{folder}: not every step from 1 to {steps} is in metrics.jsonl")
    weights = {plan.name: torch.empty(plan.shape) for plan in parameters}
    saved = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors.load_tensors(published_path(folder / "checkpoint", steps), saved, None)
    return RunOutcome([record["loss"] for record in records], [record["grad_norm"] for record in records], weights)


def compare_outcomes(ours: RunOutcome, theirs: RunOutcome) -> OutcomeDifferences:
    """How far `ours` is from `theirs`, relative to `theirs`."""
    differences = {
        name: ((ours.weights[name] - weight).norm() / weight.norm()).item() for name, weight in theirs.weights.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return OutcomeDifferences(
        loss=_max_relative_difference(ours.losses, theirs.losses),
        grad_norm=_max_relative_difference(ours.grad_norms, theirs.grad_norms),
        weights=differences[worst],
        weights_of=worst,
    )


def _max_relative_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
