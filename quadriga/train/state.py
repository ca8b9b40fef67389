"""The state of a run that changes from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from quadriga.data.loader import Loader
from quadriga.resilience.health import HealthMonitor
from quadriga.resilience.progress import Progress
from quadriga.train.feed import Feed


@dataclass
class TrainState:
    """Everything that a step changes.

    `parts` is the whole model, or this rank's pipeline stages of it. `step` counts finished optimizer steps;
    `tokens_seen` the tokens that they trained on. `attempt` counts the starts of this run in its folder, from 1;
    records of repeated steps have the higher attempt. `device` is the one that this rank computes on. `progress` holds
    the current phase; `health` judges each step; `feed` takes the batches.
    """

    parts: tuple[nn.Module, ...]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    loader: Loader
    device: torch.device
    step: int = 0
    tokens_seen: int = 0
    attempt: int = 1
    max_positions: int = 0  # longest sequence that the weights were trained for before this run
    progress: Progress = field(default_factory=Progress)
    health: HealthMonitor = field(default_factory=HealthMonitor)
    feed: Feed = field(default_factory=Feed)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for part in self.parts for parameter in part.parameters())
