"""Builds Adam and AdamW, and selects the parameters with weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.config.schema import Optimizer as OptimizerSection
from quadriga.optim.clip import EPSILON, scale_gradients
from quadriga.optim.moments import AdamWithMomentsIn
from quadriga.tensors import to_local

KERNELS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection, seed: int = 0
) -> torch.optim.Optimizer:
    """Adam (arXiv 1412.6980; decay added to the gradient) or AdamW (arXiv 1711.05101; decay applied to the weight).

    Two parameter groups, always in this order: matrices, and vectors (norms, biases). Vectors have no weight decay
    without `optimizer.decay_norms_and_biases`; with it, the update is bit for bit that of a single group.

    This is torch's optimizer, whose moments have the dtype of the parameters; with `optimizer.state_dtype` or
    `optimizer.stochastic_rounding` it is `moments.AdamWithMomentsIn`.

    Args:
        named_parameters: plain or DTensor parameters; the number of dimensions is that of the whole tensor.
        seed: of stochastic rounding.
    """
    names = {parameter: name for name, parameter in named_parameters if parameter.requires_grad}
    trained = list(names)
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
    if section.state_dtype is not None or section.stochastic_rounding:
        return AdamWithMomentsIn(
            dtype=getattr(torch, section.state_dtype) if section.state_dtype else None,
            names=names if section.stochastic_rounding else None,
            seed=seed,
            decoupled_weight_decay=section.name == "AdamW",
            **options,
        )
    algorithm = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[section.name]
    return algorithm(**options)


def clip_gradients(optimizer: torch.optim.Optimizer, gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Clip gradients of this global norm to `max_norm`, now or in the next `optimizer.step()`; 0: do not clip.

    A fused update on CUDA divides by a factor while it reads the gradients, so that no pass is added: torch's Adam
    writes the quotients back, also of 1, and `moments.AdamWithMomentsIn` does not. Others scale here.

    Args:
        gradients: all that `optimizer` updates.
        norm: float32, shape (), the same on all ranks.
    """
    if not gradients or not optimizer.defaults.get("fused") or not on_cuda(gradients[0]):
        scale_gradients(gradients, norm, max_norm)
        return
    divisor = ((norm + EPSILON) / max_norm).clamp(min=1.0).to(gradients[0].device) if max_norm > 0 else None
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # as torch.amp.GradScaler does


def on_cuda(gradient: Tensor) -> bool:
    return to_local(gradient).is_cuda


def skip_update_if(bad: Tensor, optimizer: torch.optim.Optimizer, *, on_device: bool) -> None:
    """If `bad` is true, the next `optimizer.step()` changes neither the weights nor the state of the optimizer.

    Args:
        bad: bool, shape (), the same on all ranks.
        on_device: decide on the device, without synchronization. Only for fused Adam and AdamW; others wait for `bad`.
            With CPU offload, fused Adam runs on the host and waits too.
    """
    if on_device and optimizer.defaults.get("fused"):
        # Copied to the parameters here, which waits; torch would not wait for its copy to the host.
        found_inf = bad.float().to(optimizer.param_groups[0]["params"][0].device)
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
    elif bad:
        optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
