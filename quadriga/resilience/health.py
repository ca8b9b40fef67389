"""Detects bad steps and skips their weight update: a NaN or infinite loss or gradient norm, or a loss spike.

`[health]` has the policies. The device decides, from numbers that are equal on all ranks. So all ranks decide the same,
and the host does not wait. With CUDA and a fused optimizer the update is skipped on the device too, and the host reads
the verdict at the logging step (see `bad_steps.py`). Other optimizers make the host wait for the verdict of each step,
unless both policies are `ignore`. A bad step counts as a step: its batch is consumed, and the schedule advances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quadriga.config.schema import Health as HealthSection
from quadriga.optim.clip import GradientNorms
from quadriga.optim.optimizer import skip_update_if

FINE, NOT_FINITE, SPIKE = 0, 1, 2
HOST = torch.device("cpu")
DEFAULT = HealthSection()


class StepVerdict(NamedTuple):
    """A verdict as numbers. `local_loss`: this rank's part of the loss. `first_gradient`: index of its first gradient
    that is not finite, -1 if all are. `mean`, `deviation`: of the recent losses that the loss was compared with."""

    kind: float  # FINE, NOT_FINITE, SPIKE
    local_loss: float
    first_gradient: float
    mean: float
    deviation: float


class HealthMonitor:
    """Judges every step. `verdict` of the last step: float64, shape (5,), the fields of `StepVerdict`. `skipped`:
    int64, shape (), the number of bad steps of the run. Both are on the device."""

    def __init__(
        self, section: HealthSection = DEFAULT, device: torch.device = HOST, waits: bool | None = None
    ) -> None:
        """`waits`: whether the host reads each verdict at once. None: only on a CPU, where that costs nothing."""
        self.section = section
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.verdict = torch.zeros(len(StepVerdict._fields), dtype=torch.float64, device=device)
        self.waits = device.type == "cpu" if waits is None else waits
        self._recent = RecentLosses(section.spike_window, device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def skip_if_bad(
        self, optimizer: torch.optim.Optimizer, local_loss: Tensor, norms: GradientNorms, loss: Tensor, finite: Tensor
    ) -> None:
        """Judge the current step by its `loss` over all ranks, and by whether the numbers of all ranks are `finite`.

        After a NaN or infinite loss or gradient norm, or a loss spike, the next `optimizer.step()` changes nothing.
        """
        bad_kinds = []
        mean = deviation = self._zero
        if self.section.non_finite != "ignore":
            bad_kinds.append(torch.where(finite, FINE, NOT_FINITE))
        if self.section.spike != "ignore":
            spike, mean, deviation = self._recent.compare(loss, self.section.spike_sigmas)
            spike = spike & finite
            self._recent.add_if(finite & ~spike, loss)
            bad_kinds.append(torch.where(spike, SPIKE, FINE))
        if not bad_kinds:
            return
        kind = torch.stack(bad_kinds).amax()
        bad = kind > FINE
        self.skipped = self.skipped + bad
        first = norms.first_not_finite() if not self.waits or bad else self._zero - 1
        self.verdict = torch.stack([figure.to(self._zero) for figure in (kind, local_loss, first, mean, deviation)])
        skip_update_if(bad, optimizer, on_device=not self.waits)

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run judges as this one would, as JSON values. Waits for the device."""
        return {"skipped": int(self.skipped), "recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped.fill_(state["skipped"])
        self._recent.load_state_dict(state["recent"])


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
