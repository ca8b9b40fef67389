"""Process-wide numerics: seed, determinism, precision of matrix products, and the peak rate of the device."""

from __future__ import annotations

import os

import torch
import torch._inductor.config

from quadriga.config import Run
from quadriga.config.schema import Training
from quadriga.hardware import Device, find_device

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ROWWISE = ("rowwise",)  # recipes whose scales must come from numbers rounded as in eager kernels


def set_numerics(run: Run) -> None:
    """Call before the first operation on a device, because cuBLAS reads its variable when it is initialized.

    `debug.deterministic` makes torch choose kernels with repeatable results. It also sets a cuBLAS workspace of a fixed
    size, without which torch refuses matrix products; a workspace set in the environment is kept.
    """
    config = run.config
    torch.manual_seed(run.spec.seed)
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    if config.debug.deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=config.debug.deterministic_warn_only)
    if "quantize.linear.float8" in config.model.converters and config.quantize.linear.float8.recipe_name in ROWWISE:
        # Fused kernels keep more precision than bfloat16 between two operations, so the scale of a row would not match
        # the numbers that are cast with it (https://github.com/pytorch/pytorch/issues/150859).
        torch._inductor.config.emulate_precision_casts = True


def known_gpu(device: torch.device) -> Device | None:
    """This GPU in the table of devices; None for a CPU, and for a GPU that is not in the table."""
    return find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device, training: Training) -> float | None:
    """The dense peak of this device in FLOP/s for the compute dtype; None if the device is not in the table."""
    known = known_gpu(device)
    return known.peak_flops(training.mixed_precision_param, training.float32_matmul_precision) if known else None


def bfloat16_peak(device: torch.device, training: Training) -> float | None:
    """The dense peak of this device in bfloat16, in FLOP/s, if the run computes in float32 at `highest`; else None."""
    known = known_gpu(device)
    return known.bf16 if known and training.computes_in_full_float32 else None
