"""One step's numbers. Tensors stay on the device until the logging step reads them all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepMetrics:
    """`loss`, `max_loss` and `grad_norm` are scalars on the device, already reduced over all ranks.

    `loss` is the mean cross-entropy of the step's global batch in nats per token, `max_loss` the greatest of the ranks'
    own means; `grad_norm` is the global L2 norm before clipping. `skipped`: how many steps of the run so far were bad
    and left the weights alone; `verdict`: on this one (see `resilience.health`). `data_wait` is in seconds.
    `documents`: by row of this rank, the names of those that the row was made of. `skipped_records`: records of this
    rank's rows that could not be read, each with where it is and why; `bad_records`: how many those of all ranks are so
    far.
    """

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    tokens_seen: int
    data_wait: float
    max_loss: torch.Tensor
    skipped: torch.Tensor
    verdict: torch.Tensor
    documents: Sequence[Sequence[tuple[int, int, int]]] = ()
    skipped_records: Sequence[Any] = ()
    bad_records: torch.Tensor | None = None
