"""Attention of some queries to some keys, and the merge of attention to several sets of keys.

Besides its result, attention to one set of keys returns the logarithm of the sum of the exponentials of its scores
(lse). With it, results over disjoint sets of keys are merged exactly (arXiv 2112.05682), and each set's part of the
gradients follows from the merged result alone (arXiv 2205.14135). Autograd records nothing here: the operations that
call these functions have their own backward pass.

Shapes: q and out (batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim), lse (batch, heads,
queries) in float32. Heads that share keys and values (GQA, arXiv 2305.13245) are not repeated.

| where | dtype   | kernel                                                                                    |
|-------|---------|-------------------------------------------------------------------------------------------|
| CUDA  | halves  | flash attention 2, or that of cuDNN where torch prefers it (`chosen_kernel`)              |
| CUDA  | float32 | memory-efficient attention, with repeated heads: flash has no float32, and it has no GQA  |
| CPU   | all     | flash attention for CPU, in float32: its half-precision kernel is slower and less exact   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn.attention import SDPBackend

from quadriga.models.kv_heads import repeat_kv, sum_kv

aten = torch.ops.aten
FLASH, CUDNN, EFFICIENT, CPU = "flash", "cudnn", "efficient", "cpu"
LSE_ALIGNMENT = 32  # the memory-efficient kernel pads the lse to a multiple of it, with infinity


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse); out is in float32, except for flash and cuDNN on CUDA, which return the dtype of q.

    With `causal` the queries have the last positions of the keys, and each sees the keys up to its own position.
    """
    past = k.shape[2] - q.shape[2]
    if not causal or past == 0 or chosen_kernel(q, k, v, causal) == FLASH:  # which aligns the last positions
        return _forward(q, k, v, causal)
    before = _forward(q, k[:, :, :past], v[:, :, :past], False)
    return merge(before, _forward(q, k[:, :, past:], v[:, :, past:], True))


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients of q, k and v that comes from these keys.

    `out` and `lse` are those of the complete attention, merged over all sets of keys.
    """
    past = k.shape[2] - q.shape[2]
    lse = lse.contiguous()  # the kernels ignore its strides
    if not causal or past == 0 or chosen_kernel(q, k, v, causal) == FLASH:  # which aligns the last positions
        return _backward(grad, q, k, v, out, lse, causal)
    dq, dk, dv = _backward(grad, q, k[:, :, :past], v[:, :, :past], out, lse, False)
    own_dq, own_dk, own_dv = _backward(grad, q, k[:, :, past:], v[:, :, past:], out, lse, True)
    return dq + own_dq, torch.cat((dk, own_dk), dim=2), torch.cat((dv, own_dv), dim=2)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to the union of two disjoint sets of keys, in float32, from those of each set."""
    (out, lse), (other_out, other_lse) = one, other
    both = torch.logaddexp(lse, other_lse)
    return out * (lse - both).exp().unsqueeze(-1) + other_out * (other_lse - both).exp().unsqueeze(-1), both


def empty_result(q: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialized (out, lse); out has the dtype of q unless `dtype` is given. The heads of a position are adjacent in
    memory, as the output projection needs them."""
    batch, heads, length, head_dim = q.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=dtype or q.dtype, device=q.device).transpose(1, 2)
    return out, torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)


def register_gradients(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Make `backward` the backward pass of `forward`, and register the fake kernels of both.

    `forward` takes q, k, v and more arguments, and returns (out, lse). `backward` takes the gradient of out, then q, k,
    v, out, lse and those arguments, and returns the gradients of q, k and v. The first of those arguments may be a
    tensor, which has no gradient.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *rest = inputs
        tensors = rest[:1] if isinstance(rest[0], Tensor) else []
        ctx.rest = rest[len(tensors) :]
        ctx.save_for_backward(q, k, v, *output, *tensors)

    def run_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        given = (*ctx.saved_tensors, *ctx.rest)
        return *backward(grad, *given), *[None] * (len(given) - 5)

    forward.register_fake(lambda q, *rest: empty_result(q))
    backward.register_fake(lambda grad, q, k, v, *rest: empty_gradients(q, k, v))
    forward.register_autograd(run_backward, setup_context=setup_context)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def chosen_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """FLASH, CUDNN, EFFICIENT or CPU.

    In half precision on CUDA it is cuDNN's where torch's own attention would take that one (`torch._fused_sdp_choice`,
    which knows device, version and shapes), else flash. With deterministic algorithms it is flash, because the backward
    pass of cuDNN is not deterministic. With `causal` the queries' own keys decide, because only FLASH accepts more.
    """
    if q.device.type != "cuda":
        return CPU
    if q.dtype.itemsize >= 4:
        return EFFICIENT
    if torch.are_deterministic_algorithms_enabled():
        return FLASH
    if causal:
        k, v = (x[:, :, x.shape[2] - q.shape[2] :] for x in (k, v))
    choice = torch._fused_sdp_choice(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return CUDNN if choice == SDPBackend.CUDNN_ATTENTION.value else FLASH


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    kernel = chosen_kernel(q, k, v, causal)
    if kernel == FLASH:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse
    if kernel == CUDNN:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
        return out, lse.squeeze(-1)
    if kernel == EFFICIENT:
        return efficient_forward(_efficient, q, k, v, causal)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float(), 0.0, causal)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = chosen_kernel(q, k, v, causal)
    if kernel == FLASH:
        state, unused = _unused_random_state(q)
        lengths = (None, None, q.shape[2], k.shape[2])
        given = (grad.contiguous(), q, k, v, out, lse, *lengths, 0.0, causal, state, unused)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(*given)
        return dq, dk, dv
    if kernel == CUDNN:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        without_bias = (seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad.contiguous(), q, k, v, out, lse.unsqueeze(-1), *without_bias
        )
        return dq, dk, dv
    if kernel == EFFICIENT:
        return efficient_backward(_efficient_backward, grad, q, k, v, out, lse, causal)
    grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    return dq, dk, dv


def flash_forward_of_lengths(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, q_length: int, k_length: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of flash attention 2 on CUDA to rows that lie end to end, (tokens, heads, head_dim); lse is (heads,
    tokens). `lengths`: `attention_documents.Lengths`. `q_length`, `k_length`: of the longest piece."""
    causal = lengths.causal  # aligned at the last positions of each piece
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, lengths.queries, lengths.keys, q_length, k_length, 0.0, causal, False
    )
    return out, lse


def flash_backward_of_lengths(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Any,
    q_length: int,
    k_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `flash_forward_of_lengths`."""
    state, unused = _unused_random_state(q)
    pieces = (lengths.queries, lengths.keys, q_length, k_length)
    given = (grad.contiguous(), q, k, v, out, lse, *pieces, 0.0, lengths.causal, state, unused)
    dq, dk, dv = aten._flash_attention_backward(*given)
    return dq, dk, dv


def _unused_random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention takes the state of the random generator, but does not read it without dropout."""
    state, unused = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    return state, unused


def efficient_forward(
    kernel: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a kernel without GQA that pads the lse to a multiple of LSE_ALIGNMENT.

    `kernel(q, k, v, causal)` is the memory-efficient one on CUDA. It is an argument so that a test on CPU covers the
    code around it.
    """
    out, lse = kernel(q, *(repeat_kv(x, q.shape[1]) for x in (k, v)), causal)
    return out, lse[:, :, : q.shape[2]]


def efficient_backward(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `efficient_forward`. `kernel` gets repeated heads and the padded lse."""
    heads, kv_heads, fill = q.shape[1], k.shape[1], -q.shape[2] % LSE_ALIGNMENT
    filled = F.pad(lse, (0, fill), value=torch.inf)
    dq, dk, dv = kernel(grad, q, repeat_kv(k, heads), repeat_kv(v, heads), out, filled, causal)
    return dq, sum_kv(dk, kv_heads), sum_kv(dv, kv_heads)


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out, lse


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    seeds_and_wanted = (seed, seed, 0.0, [True, True, True, False])
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad.contiguous(), q, k, v, None, out, lse, *seeds_and_wanted, causal
    )
    return dq, dk, dv
