"""The metrics of one step. Tensors stay on the device until the logging step reads them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepMetrics:
    """`loss`, `max_loss` and `grad_norm` have shape () and are on the device, already reduced over all ranks.

    `loss` is the mean cross-entropy of the step's global batch in nats per token, `max_loss` the largest of the ranks'
    own means; `grad_norm` is the global L2 norm before clipping. `skipped`: number of bad steps of the run so far,
    which did not change the weights; `verdict`: of this step (see `resilience.health`). `data_wait` is in seconds.
    `documents`: by row of this rank, the ids of its documents. `skipped_records`: unreadable records of this rank's
    rows, with location and reason; `bad_records`: their number on all ranks so far. `sources`: of a mixture, by name
    the `tokens` and `epochs` of each source so far; None in other runs. `attention`: with documents, the pairs of a
    query and a key that are seen in each layer, over all ranks, and the largest share of a rank over the mean.
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
    documents: Sequence[Sequence[tuple[str | int, ...]]] = ()
    skipped_records: Sequence[Any] = ()
    bad_records: torch.Tensor | None = None
    sources: Mapping[str, Mapping[str, float]] | None = None
    attention: tuple[torch.Tensor, torch.Tensor] | None = None
