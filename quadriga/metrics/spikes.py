"""Detects losses far above the recent ones. The state is on the device, so that the host need not wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RecentLosses:
    """The last `window` losses, in float64. Until the window is half full, no loss counts as a spike."""

    def __init__(self, window: int, device: torch.device) -> None:
        self._losses = torch.zeros(window, dtype=torch.float64, device=device)
        self._places = torch.arange(window, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # of all losses ever added

    def compare(self, loss: Tensor, sigmas: float) -> tuple[Tensor, Tensor, Tensor]:
        """Whether `loss` is more than `sigmas` standard deviations above the mean, the mean, and the deviation.

        All have shape (). The deviation is that of the population; mean and deviation are 0 without losses.
        """
        there = self._places < self._count
        number = there.sum().clamp(min=1)
        mean = self._losses.sum() / number  # unused places are 0
        deviation = (torch.where(there, self._losses - mean, 0.0).square().sum() / number).sqrt()
        enough = 2 * self._count >= len(self._losses)
        return enough & (loss > mean + sigmas * deviation), mean, deviation

    def add_if(self, wanted: Tensor, loss: Tensor) -> None:
        """Replace the oldest loss by `loss` if `wanted` is true; both have shape ()."""
        here = wanted & (self._places == self._count % len(self._losses))
        self._losses = torch.where(here, loss, self._losses)
        self._count = self._count + wanted

    def state_dict(self) -> dict[str, Any]:
        """{"count": of all losses ever added, "losses": [oldest first]}, as JSON values. Waits for the device."""
        count, window = int(self._count), len(self._losses)
        losses: list[float] = self._losses.tolist()
        oldest = count % window if count > window else 0
        return {"count": count, "losses": (losses[oldest:] + losses[:oldest])[: min(count, window)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, bit for bit, because each loss returns to its own place. A smaller window keeps the newest
        losses; a larger one, or one that was never full, begins with the saved ones."""
        window = len(self._losses)
        losses = torch.tensor(state["losses"][-window:], dtype=torch.float64, device=self._losses.device)
        count = state["count"] if len(losses) == window else len(losses)
        self._losses.zero_()
        self._losses[(self._places[: len(losses)] + count - len(losses)) % window] = losses
        self._count.fill_(count)
