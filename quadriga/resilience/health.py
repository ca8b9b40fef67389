"""Is a step bad: no finite loss or gradient norm, or a loss that jumps? Then the weights are left alone (`[health]`).

Decided on the device, from numbers that all ranks hold alike, so that they decide alike and nobody waits. With CUDA and
a fused optimizer the update is skipped on the device too, and the host learns of it at the logging step (see
`bad_steps.py`). Other optimizers make the host wait for the verdict of each step, unless both policies are `ignore`.
A bad step counts as a step: its batch is consumed, the schedule goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quadriga.comm.loss import StepTotals
from quadriga.config.schema import Health as HealthSection
from quadriga.metrics.spikes import RecentLosses
from quadriga.optim.clip import GradientNorms
from quadriga.optim.skip_update import skip_update_if

FINE, NOT_FINITE, SPIKE = 0, 1, 2
HOST = torch.device("cpu")
DEFAULT = HealthSection()


class StepVerdict(NamedTuple):
    """What a verdict says, as numbers. `local_loss`: this rank's part; `first_gradient`: which of its gradients is the
    first that is not finite, -1 if none is; `mean`, `deviation`: of the losses that the loss was measured against."""

    kind: float  # FINE, NOT_FINITE, SPIKE
    local_loss: float
    first_gradient: float
    mean: float
    deviation: float


class HealthMonitor:
    """Judges every step. `verdict` on the last one: float64, the fields of `StepVerdict`; `skipped`: int64, how many
    steps of the run were bad. Both on the device."""

    def __init__(
        self, section: HealthSection = DEFAULT, device: torch.device = HOST, waits: bool | None = None
    ) -> None:
        """`waits`: whether the host looks at each verdict at once. None: where that costs nothing, on a CPU."""
        self.section = section
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.verdict = torch.zeros(len(StepVerdict._fields), dtype=torch.float64, device=device)
        self.waits = device.type == "cpu" if waits is None else waits
        self._recent = RecentLosses(section.spike_window, device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def skip_if_bad(
        self, optimizer: torch.optim.Optimizer, local_loss: Tensor, norms: GradientNorms, totals: StepTotals
    ) -> None:
        """Judge the step under way. Where it is bad, by a NaN or infinite loss or gradient norm or by a loss spike, the
        coming `optimizer.step()` changes nothing."""
        bad_kinds = []
        mean = deviation = self._zero
        if self.section.non_finite != "ignore":
            bad_kinds.append(torch.where(totals.finite, FINE, NOT_FINITE))
        if self.section.spike != "ignore":
            spike, mean, deviation = self._recent.compare(totals.loss, self.section.spike_sigmas)
            spike = spike & totals.finite
            self._recent.add_if(totals.finite & ~spike, totals.loss)
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
        """What a resumed run must know to judge as this one would; JSON-able. Waits for the device."""
        return {"skipped": int(self.skipped), "recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped.fill_(state["skipped"])
        self._recent.load_state_dict(state["recent"])
