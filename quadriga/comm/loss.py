"""The loss of a step over all ranks, and the other numbers that travel with it: one small collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.comm import collectives
from quadriga.comm.mesh import Mesh


@dataclass(frozen=True)
class StepTotals:
    """One step's numbers over all ranks: scalars on the device, the same on every rank to the bit."""

    loss: Tensor  # float64: the mean over the tokens of the global batch, in nats
    max_loss: Tensor  # float64: the greatest mean over the tokens of one rank
    grad_norm: Tensor  # float32: of all gradients, before clipping
    finite: Tensor  # bool: whether every rank's own part of the loss and norm are
    bad_records: Tensor | None  # float64: records that were left out of the data so far; None where none may be


def all_reduce_loss(
    local_loss: Tensor, local_norm: Tensor, mesh: Mesh, local_bad_records: int | None = None
) -> StepTotals:
    """One collective for all of it. `local_loss`: this rank's part, float64; `local_norm`: the norm as this rank knows
    it; `local_bad_records`: those of the rows that no other rank counts; None on all ranks where nothing is left out.

    Everyone takes the first rank's norm: replicas sum their squares each on their own, and a last bit that came out
    otherwise on one of them would drive their weights apart.
    """
    counted = [] if local_bad_records is None else [torch.full_like(local_loss, local_bad_records)]
    by_rank = collectives.all_gather_numbers(torch.stack((local_loss, local_norm.to(local_loss), *counted)))
    losses = mesh.loss_rows(by_rank)[:, 0]
    parts = mesh.batch_degree * mesh.cp.size()  # that the batch is cut into; ranks without a loss hold 0
    return StepTotals(
        loss=losses.sum(),
        max_loss=losses.max() * parts,
        grad_norm=by_rank[0, 1].float(),
        finite=by_rank.isfinite().all(),
        bad_records=by_rank[:, 2].sum() if counted else None,
    )
