"""Is a step bad: no finite loss or gradient norm, or a loss that jumps? Then the weights are left alone (`[health]`).

Decided on the device, from numbers that all ranks hold alike, so that they decide alike and nobody waits. With CUDA and
a fused optimizer the update is withheld on the device too, and the host learns of it at the logging step (see
`bad_steps.py`). Other optimizers make the host wait for the verdict of each step, unless both policies are `ignore`.
A bad step counts as a step: its batch is consumed, the schedule goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quadriga.comm import collectives
from quadriga.comm.mesh import Mesh
from quadriga.config.schema import Health as HealthSection
from quadriga.metrics.spikes import RecentLosses
from quadriga.optim.clip import GradientNorms
from quadriga.optim.withhold import withhold_update_if

FINE, NOT_FINITE, SPIKE = 0, 1, 2
HOST = torch.device("cpu")
DEFAULT = HealthSection()


@dataclass(frozen=True)
class Totals:
    """One step's numbers over all ranks: scalars on the device, the same on every rank to the bit."""

    loss: Tensor  # float64: the mean over the tokens of the global batch, in nats
    max_loss: Tensor  # float64: the greatest mean over the tokens of one rank
    grad_norm: Tensor  # float32: of all gradients, before clipping
    finite: Tensor  # bool: whether every rank's own part of the loss and norm are
    bad_records: Tensor | None  # float64: records that were left out of the data so far; None where none may be


def add_up(own_loss: Tensor, own_norm: Tensor, mesh: Mesh, own_bad_records: int | None = None) -> Totals:
    """One collective for all of it. `own_loss`: this rank's part, float64; `own_norm`: the norm as this rank knows it;
    `own_bad_records`: those of the rows that no other rank counts; None on all ranks where nothing is left out.

    Everyone takes the first rank's norm: replicas sum their squares each on their own, and a last bit that came out
    otherwise on one of them would drive their weights apart.
    """
    counted = [] if own_bad_records is None else [torch.full_like(own_loss, own_bad_records)]
    by_rank = collectives.numbers_of_all(torch.stack((own_loss, own_norm.to(own_loss), *counted)))
    losses = mesh.of_loss(by_rank)[:, 0]
    parts = mesh.batch_degree * mesh.cp.size()  # that the batch is cut into; ranks without a loss hold 0
    return Totals(
        loss=losses.sum(),
        max_loss=losses.max() * parts,
        grad_norm=by_rank[0, 1].float(),
        finite=by_rank.isfinite().all(),
        bad_records=by_rank[:, 2].sum() if counted else None,
    )


class Finding(NamedTuple):
    """What a verdict says, as numbers. `own_loss`: this rank's part; `first_gradient`: which of its gradients is the
    first that is not finite, -1 if none is; `mean`, `deviation`: of the losses that the loss was measured against."""

    kind: float  # FINE, NOT_FINITE, SPIKE
    own_loss: float
    first_gradient: float
    mean: float
    deviation: float


class Health:
    """Judges every step. `verdict` on the last one: float64, the fields of `Finding`; `skipped`: int64, how many steps
    of the run were bad. Both on the device."""

    def __init__(
        self, section: HealthSection = DEFAULT, device: torch.device = HOST, waits: bool | None = None
    ) -> None:
        """`waits`: whether the host looks at each verdict at once. None: where that costs nothing, on a CPU."""
        self.section = section
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.verdict = torch.zeros(len(Finding._fields), dtype=torch.float64, device=device)
        self.waits = device.type == "cpu" if waits is None else waits
        self._recent = RecentLosses(section.spike_window, device)
        self._none = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def withhold_if_bad(
        self, optimizer: torch.optim.Optimizer, own_loss: Tensor, norms: GradientNorms, totals: Totals
    ) -> None:
        """Judge the step under way; where it is bad, the coming `optimizer.step()` changes nothing."""
        bad_kinds = []
        mean = deviation = self._none
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
        first = norms.first_not_finite() if not self.waits or bad else self._none - 1
        self.verdict = torch.stack([figure.to(self._none) for figure in (kind, own_loss, first, mean, deviation)])
        withhold_update_if(bad, optimizer, on_device=not self.waits)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to judge as this one would; JSON-able. Waits for the device."""
        return {"skipped": int(self.skipped), "recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped.fill_(state["skipped"])
        self._recent.load_state_dict(state["recent"])
