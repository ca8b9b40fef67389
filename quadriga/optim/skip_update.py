"""Skips optimizer steps, for example after a NaN or infinite loss."""

from __future__ import annotations

import torch
from torch import Tensor


def skip_update_if(bad: Tensor, optimizer: torch.optim.Optimizer, *, on_device: bool) -> None:
    """If `bad` is true, the next `optimizer.step()` changes neither the weights nor the state of the optimizer.

    Args:
        bad: bool, shape (), the same on all ranks.
        on_device: decide on the device, without synchronization. Only for fused Adam and AdamW; others wait for `bad`.
    """
    if on_device and optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
    elif bad:
        optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
