"""Builds Adam and AdamW, and selects the parameters with weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.config.schema import Optimizer as OptimizerSection
from quadriga.optim.moments import AdamWithMomentsIn

KERNELS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection
) -> torch.optim.Optimizer:
    """Adam (arXiv 1412.6980; decay added to the gradient) or AdamW (arXiv 1711.05101; decay applied to the weight).

    Two parameter groups, always in this order: matrices, and vectors (norms, biases). Vectors have no weight decay
    without `optimizer.decay_norms_and_biases`; with it, the update is bit for bit that of a single group.

    This is torch's optimizer, whose moments have the dtype of the parameters; with `optimizer.state_dtype` it is
    `moments.AdamWithMomentsIn`.

    Args:
        named_parameters: plain or DTensor parameters; the number of dimensions is that of the whole tensor.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    vector_decay = section.weight_decay if section.decay_norms_and_biases else 0.0
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": vector_decay},
    ]
    options: dict[str, Any] = {
        "params": [group for group in groups if group["params"]],
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        **KERNELS[section.implementation],
    }
    if section.state_dtype is not None:
        dtype, decoupled = getattr(torch, section.state_dtype), section.name == "AdamW"
        return AdamWithMomentsIn(dtype=dtype, decoupled_weight_decay=decoupled, **options)
    algorithm = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[section.name]
    return algorithm(**options)


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
