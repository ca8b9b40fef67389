"""Steps of the optimizer that must not be taken."""

from __future__ import annotations

import torch
from torch import Tensor


def skip_update_if(bad: Tensor, optimizer: torch.optim.Optimizer, *, on_device: bool) -> None:
    """Let the coming `optimizer.step()` change neither weights nor its own state where `bad` holds.

    Args:
        bad: bool, shape (), the same on all ranks.
        on_device: decide without waiting for the device. Only fused Adam and AdamW can; for others the host waits.
    """
    if on_device and optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells its optimizers
    elif bad:
        optimizer.zero_grad(set_to_none=True)  # a step without gradients moves nothing
