"""Reduces the loss of a step and a few other numbers over all ranks, in one small collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.comm import collectives
from quadriga.comm.mesh import Mesh


@dataclass(frozen=True)
class StepTotals:
    """One step's numbers over all ranks: tensors of shape () on the device, equal on all ranks to the bit."""

    loss: Tensor  # float64: mean over the tokens of the global batch, in nats
    max_loss: Tensor  # float64: the largest mean over the tokens of one rank, in nats
    grad_norm: Tensor  # float32: L2 norm of all gradients, before clipping
    finite: Tensor  # bool: whether the loss and the norm of every rank are finite
    bad_records: Tensor | None  # float64: records skipped so far; None if skipping is off


def all_reduce_loss(
    local_loss: Tensor, local_norm: Tensor, mesh: Mesh, local_bad_records: int | None = None
) -> StepTotals:
    """Reduce all numbers in one collective.

    All ranks use the first rank's norm. Each replica sums the squares by itself, and a difference in the last bit would
    make the weights of the replicas differ.

    Args:
        local_loss: this rank's part of the loss, float64, shape ().
        local_norm: the gradient norm as this rank computed it, shape ().
        local_bad_records: records skipped in rows that no other rank counts; None on all ranks if skipping is off.
    """
    counted = [] if local_bad_records is None else [torch.full_like(local_loss, local_bad_records)]
    by_rank = collectives.all_gather_numbers(torch.stack((local_loss, local_norm.to(local_loss), *counted)))
    losses = mesh.loss_rows(by_rank)[:, 0]
    parts = mesh.batch_degree * mesh.cp.size()  # of the batch; ranks without a loss have 0
    return StepTotals(
        loss=losses.sum(),
        max_loss=losses.max() * parts,
        grad_norm=by_rank[0, 1].float(),
        finite=by_rank.isfinite().all(),
        bad_records=by_rank[:, 2].sum() if counted else None,
    )
