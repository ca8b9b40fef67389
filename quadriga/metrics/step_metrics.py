"""One step's numbers. Tensors stay on the device until the logging step reads them all at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepMetrics:
    """`loss` and `grad_norm` are float32 scalars on the device, already reduced over all ranks.

    `loss` is the mean cross-entropy of the step's global batch in nats per token; `grad_norm` is the global L2 norm
    before clipping. `data_wait` is in seconds.
    """

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    tokens_seen: int
    data_wait: float
