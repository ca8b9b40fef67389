"""Context parallelism by gathering keys and values (as in Llama 3, arXiv 2407.21783, section 3.3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quadriga.parallel.attention_documents import attend_documents, attend_documents_backward
from quadriga.parallel.attention_kernels import attend, attend_backward, empty_result, register_gradients
from quadriga.parallel.sequence_cut import SequenceCut

c10d = torch.ops._c10d_functional


class AllGatherAttention(nn.Module):
    """Gather the keys and values of the whole sequence; attend with the queries of this rank."""

    def __init__(self, core: nn.Module, cut: SequenceCut, group_name: str) -> None:
        super().__init__()
        self.cut, self.group_name = cut, group_name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        # The sequence comes first, because an all-gather concatenates the ranks' parts along dimension 0.
        local = torch.stack((k, v)).movedim(3, 0).contiguous()
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(local, self.cut.size, self.group_name))
        whole_k, whole_v = self.cut.to_sequence_order(gathered).movedim(0, 3).unbind()
        out, _ = chunk_attention(q, whole_k, whole_v, borders, self.cut.starts(q.shape[2]))
        return out


@torch.library.custom_op("quadriga::chunk_attention", mutates_args=())
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, starts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Causal attention of a part of a sequence to the whole sequence: (out, lse).

    It is a custom operation so that no mask of queries x keys is built and only `out` and `lse` are saved.

    Args:
        q: (batch, heads, part, head_dim): `len(starts)` chunks of equal length, concatenated.
        k, v: (batch, kv_heads, seq, head_dim), in natural order.
        borders: of documents (`attention_documents`), which do not see each other; None: one document per row.
        starts: the chunks' first positions.

    Returns:
        out: (batch, heads, part, head_dim), dtype of q. lse: (batch, heads, part), float32.
    """
    length = q.shape[2] // len(starts)
    out, lse = empty_result(q)
    for number, start in enumerate(starts):
        own = slice(number * length, (number + 1) * length)
        given = (q[:, :, own], k[:, :, : start + length], v[:, :, : start + length])
        if borders is None:
            out[:, :, own], lse[:, :, own] = attend(*given, causal=True)
        else:
            out[:, :, own], lse[:, :, own] = attend_documents(*given, borders, start, 0)
    return out, lse


@torch.library.custom_op("quadriga::chunk_attention_backward", mutates_args=())
def chunk_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    borders: Tensor | None,
    starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes. Those of k and v are summed in float32, then rounded."""
    length = q.shape[2] // len(starts)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for number, start in enumerate(starts):
        own, seen = slice(number * length, (number + 1) * length), slice(0, start + length)
        given = (grad[:, :, own], q[:, :, own], k[:, :, seen], v[:, :, seen], out[:, :, own], lse[:, :, own])
        if borders is None:
            dq[:, :, own], chunk_dk, chunk_dv = attend_backward(*given, causal=True)
        else:
            dq[:, :, own], chunk_dk, chunk_dv = attend_documents_backward(*given, borders, start, 0)
        dk[:, :, seen] += chunk_dk
        dv[:, :, seen] += chunk_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)


register_gradients(chunk_attention, chunk_attention_backward)
