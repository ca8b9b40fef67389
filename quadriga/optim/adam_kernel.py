"""One Triton kernel for a whole update of Adam or AdamW on CUDA: clipping, moments, decay, weight, rounding.

It reads and writes each tensor once and makes no copies, whatever their dtypes. Its arithmetic is float32, as that of
`moments` on float32 copies. Not measured on a GPU yet.

Triton is imported at the first update on CUDA (`triton_kernel`), because machines without a GPU may not have it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quadriga.optim.rounding import FACTORS, MORE, STEP, UPPER

ELEMENTS = 1024  # of one program
NUMBERS, UNUSED = 5, (0, 0, 0, 1, 1)  # of a `rounding.Place`
CONSTANTS = tuple(number % 2**32 for number in (*FACTORS, STEP, UPPER, MORE))
tl: Any = None  # triton.language, set by `triton_kernel`, as are the two functions below
mix: Any = None
round_bits: Any = None


def update_all(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: Tensor,
    corrections: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    numbers: list[float],
    decoupled: bool,
    places: list[int],
) -> None:
    """Update contiguous tensors in place, all of one device.

    Args:
        steps: the number of the update of each parameter, from 1: float32, shape (parameters,).
        corrections: 1 - beta1**step and sqrt(1 - beta2**step): float32, shape (parameters, 2).
        found_inf: float32, shape (); not 0: change nothing.
        grad_scale: float32, shape (); gradients are divided by it.
        numbers: lr, beta1, beta2, eps, weight decay.
        places: the numbers of a `rounding.Place` for each parameter, to round bfloat16 stochastically; [] to nearest.
    """
    kernel, (lr, beta1, beta2, eps, decay) = triton_kernel(), numbers
    for number, (weight, gradient, mean, square) in enumerate(zip(weights, gradients, means, squares, strict=True)):
        if weight.numel() == 0:
            continue
        kernel[(-(-weight.numel() // ELEMENTS),)](
            *(weight, gradient.contiguous(), mean, square, steps, corrections),
            steps if found_inf is None else found_inf,  # any pointer, which is not read
            steps if grad_scale is None else grad_scale,
            *(number, weight.numel(), lr, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * decay if decoupled else decay),
            *(places[NUMBERS * number : NUMBERS * (number + 1)] or UNUSED),
            *(decoupled, found_inf is not None, grad_scale is not None, bool(places), CONSTANTS, ELEMENTS),
        )


# A custom operation, so that a run on fake tensors passes over it.
adam_update = torch.library.custom_op(
    "quadriga::adam_update", update_all, mutates_args=("weights", "means", "squares"), device_types="cuda"
)
adam_update.register_fake(lambda *_: None)


@cache
def triton_kernel() -> Any:
    """Import Triton, and return the kernel of one parameter."""
    global tl, mix, round_bits
    import triton
    import triton.language

    tl, mix, round_bits = triton.language, triton.jit(_mix), triton.jit(_round_bits)
    return triton.jit(_update, do_not_specialize=["number", "key", "other_key", "start"])


# The code below is compiled by Triton. It has no type annotations except those of constants, which Triton reads.


def _update(  # type: ignore[no-untyped-def]
    weight_at, gradient_at, mean_at, square_at, step_at, corrections_at, found_inf_at, grad_scale_at, number, count,
    lr, new1, beta2, new2, eps, decay, key, other_key, start, columns, stride, DECOUPLED: tl.constexpr,
    MAY_SKIP: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr, CONSTANTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    if MAY_SKIP:
        count = tl.where(tl.load(found_inf_at) == 0, count, 0)
    mask = element < count
    weight = tl.load(weight_at + element, mask).to(tl.float32)
    gradient = tl.load(gradient_at + element, mask).to(tl.float32)
    mean = tl.load(mean_at + element, mask).to(tl.float32)
    square = tl.load(square_at + element, mask).to(tl.float32)
    if SCALED:
        gradient = tl.div_rn(gradient, tl.load(grad_scale_at) + tl.zeros_like(gradient))
    if DECOUPLED:
        weight = weight * decay
    else:
        gradient = gradient + decay * weight
    mean = mean + (gradient - mean) * new1
    square = square * beta2 + gradient * gradient * new2
    first, second = tl.load(corrections_at + 2 * number), tl.load(corrections_at + 2 * number + 1)
    root = tl.div_rn(tl.sqrt_rn(square), second + tl.zeros_like(square)) + eps
    weight = weight - (lr / first) * tl.div_rn(mean, root)
    if STOCHASTIC:
        index = element // columns * stride + element % columns + start
        step = tl.load(step_at + number).to(tl.int64).to(tl.uint32)
        upper = (index >> 32).to(tl.uint32) * CONSTANTS[3] + step * CONSTANTS[2] + other_key.to(tl.uint32)
        word = mix(mix(index.to(tl.uint32) ^ key.to(tl.uint32), CONSTANTS) ^ upper, CONSTANTS)
        if weight_at.dtype.element_ty == tl.bfloat16:
            weight = round_bits(weight, word & 0xFFFF)
        if mean_at.dtype.element_ty == tl.bfloat16:
            mean = round_bits(mean, word >> 16)
        if square_at.dtype.element_ty == tl.bfloat16:
            square = round_bits(square, mix(word ^ CONSTANTS[4], CONSTANTS) & 0xFFFF)
    tl.store(weight_at + element, weight.to(weight_at.dtype.element_ty), mask)
    tl.store(mean_at + element, mean.to(mean_at.dtype.element_ty), mask)
    tl.store(square_at + element, square.to(square_at.dtype.element_ty), mask)


def _mix(x, CONSTANTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`rounding.mixed`."""
    x = (x ^ (x >> 16)) * CONSTANTS[0]
    x = (x ^ (x >> 15)) * CONSTANTS[1]
    return x ^ (x >> 16)


def _round_bits(exact, random):  # type: ignore[no-untyped-def]
    """`rounding.rounded`."""
    bits = exact.to(tl.uint32, bitcast=True) + random
    result = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(exact) < float("inf"), result, exact)
