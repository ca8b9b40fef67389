"""Float8: linear layers multiply in 8 bits, by torchao's `Float8Linear` (arXiv 2209.05433).

Parameters keep their dtype and names. For each product the operands are scaled and cast, with one scale per matrix
(`tensorwise`) or per row (`rowwise`; `rowwise_with_gw_hp` computes the weights' gradients in high precision). Only this
module imports torchao.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from quadriga.comm.mesh import Mesh
from quadriga.config.schema import LinearFloat8
from quadriga.errors import Problem, UserError
from quadriga.log import logger
from quadriga.models.plan import TensorCut
from quadriga.parallel.tensor_parallel import plain_output
from quadriga.tensors import from_local_like, plain_data, to_local

TABLE = "quantize.linear.float8"
TORCHAO = "0.18.0"
AUTO_FILTER = "auto_filter_small_kn"
MULTIPLE = 16  # float8 units of GPUs need both widths of a matrix to be multiples of it
FIRST_CAPABLE = (8, 9)  # CUDA compute capability


def apply_float8(model: nn.Module, cuts: tuple[TensorCut, ...], mesh: Mesh, section: LinearFloat8) -> None:
    """Convert the linear layers of `model` that allow it to float8, in place. It may be on meta; names do not change.

    Logs which layers are not converted, and why. `cuts` give the local widths of layers under tensor parallelism.

    Raises:
        UserError: torchao is not installed, or the device has no float8 and `emulate` is false.
    """
    _check_library()
    if not section.emulate:
        _check_device(mesh.device_mesh.device_type)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    unconverted = dict(_unconverted_layers(model, cuts, mesh.tp.size(), section))
    config = Float8LinearConfig.from_recipe_name(section.recipe_name or "tensorwise")
    config = replace(
        config, emulate=section.emulate, enable_fsdp_float8_all_gather=section.enable_fsdp_float8_all_gather
    )
    convert_to_float8_training(model, module_filter_fn=lambda module, name: name not in unconverted, config=config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and section.enable_fsdp_float8_all_gather:
            module.register_state_dict_post_hook(_save_plain_weight)
        if isinstance(module, nn.Linear) and "." not in name:  # not within a block
            module.register_forward_hook(plain_output)  # torchao's layer returns a view
    _log_summary(model, unconverted, section)


def precompute_scales(
    optimizer: torch.optim.Optimizer, parts: tuple[nn.Module, ...], section: LinearFloat8 | None
) -> None:
    """If `section` requests it, compute the scales of all weights after each step, in one reduction. This has no effect
    without float8 all-gathers."""
    if section is None or not section.precompute_float8_dynamic_scale_for_fsdp:
        return
    if not section.enable_fsdp_float8_all_gather:
        return
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    def after_step(*_: object) -> None:
        for part in parts:
            precompute_float8_dynamic_scale_for_fsdp(part)

    optimizer.register_step_post_hook(after_step)


def _save_plain_weight(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Save the plain weight instead of torchao's tensor subclass, so that a checkpoint can be read without torchao."""
    name = f"{prefix}weight"
    weight = state[name]
    local = to_local(weight)
    if (plain := plain_data(local)) is not local:  # shares memory, so a load changes the weight
        state[name] = from_local_like(plain, weight)


def _unconverted_layers(
    model: nn.Module, cuts: tuple[TensorCut, ...], tp: int, section: LinearFloat8
) -> Iterator[tuple[str, str]]:
    """The names of linear layers that are not converted, each with the reason."""
    styles = {cut.module: cut.style for cut in cuts}
    named = [part for part in section.filter_fqns if part != AUTO_FILTER]
    is_large = _size_filter(section)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        n_out, n_in = module.weight.shape
        n_out = n_out // tp if styles.get(name) in ("columns", "logits") else n_out
        n_in = n_in // tp if styles.get(name) == "rows" else n_in
        if any(part in name for part in named):
            yield name, "named by filter_fqns"
        elif n_out % MULTIPLE or n_in % MULTIPLE:
            yield name, f"not a multiple of {MULTIPLE} wide"
        elif not is_large(module, name):
            yield name, "too small to gain"


def _size_filter(section: LinearFloat8) -> Callable[[nn.Module, str], bool]:
    """torchao's thresholds, measured on H100."""
    if AUTO_FILTER not in section.filter_fqns:
        return lambda module, name: True
    from torchao.float8 import _auto_filter_for_recipe

    is_large: Callable[[nn.Module, str], bool] = _auto_filter_for_recipe(section.recipe_name or "tensorwise", [])
    return is_large


def _log_summary(model: nn.Module, unconverted: dict[str, str], section: LinearFloat8) -> None:
    from torchao.float8.float8_linear import Float8Linear

    count = sum(isinstance(module, Float8Linear) for module in model.modules())
    how = "emulated, which is slow" if section.emulate else section.recipe_name or "tensorwise"
    logger.info(f"float8: {count} linear layers ({how})")
    for reason in dict.fromkeys(unconverted.values()):
        names = [name for name, why in unconverted.items() if why == reason]
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        logger.info(f"float8: {len(names)} not converted, {reason}: {shown}")


def _check_library() -> None:
    if find_spec("torchao") is None:
        raise UserError(
            Problem(
                "model.converters",
                "float8 needs torchao, which is not installed",
                TABLE,
                fix=f"pip install torchao=={TORCHAO}, or remove the converter",
            )
        )


def _check_device(device_type: str) -> None:
    capable = device_type == "cuda" and torch.cuda.get_device_capability() >= FIRST_CAPABLE
    if not capable:
        device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        raise UserError(
            Problem(
                "model.converters",
                f"this device ({device}) does not support float8",
                TABLE,
                allowed="GPUs of compute capability 8.9 and up (Ada, Hopper, Blackwell)",
                fix=f"remove the converter, or set {TABLE}.emulate = true to rehearse its numerics",
            )
        )
