"""Context parallelism: the ranks of a group share every sequence, and only attention needs other ranks' tokens.

Bytes that a rank sends per layer and micro-batch of B sequences of S tokens (it receives as many):
Q = B x S/cp x heads/tp x head_dim x itemsize, KV = 2 Q x kv_heads/heads, and KV4 is KV in float32.

| method      | forward                              | backward                             | overlaps |
|-------------|--------------------------------------|--------------------------------------|----------|
| `allgather` | 1 all-gather: (cp - 1) KV            | 1 reduce-scatter: (cp - 1) KV        | no       |
| `ring`      | cp - 1 sends: (cp - 1) KV            | 2 (cp - 1) sends: (cp - 1)(KV + KV4) | yes      |
| `ulysses`   | 2 all-to-all: (cp - 1)/cp (2 Q + KV) | the same as forward                  | no       |

`ulysses` requires that both numbers of heads are divisible by cp x tp; the others have no requirement.

A block that recomputes attention sends the forward column twice. Recompute per operation saves the results of `ring`
and `ulysses`. With `allgather` it saves the attention, but not the gathered keys and values, which are cp times larger
than the local ones: they are gathered again. `allgather` holds the keys and values of the whole sequence, for one layer
at a time if blocks are recomputed, otherwise for all layers. `ring` never does, and `ulysses` holds some heads of them.

Gradients of keys and values are summed over the ranks in their own dtype with `allgather` (by the reduce-scatter), and
in float32 with `ring`. With `ulysses` there is no such sum.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from quadriga.config.schema import Parallelism
from quadriga.parallel.attention_allgather import AllGatherAttention
from quadriga.parallel.attention_ring import RingAttention
from quadriga.parallel.attention_ulysses import UlyssesAttention
from quadriga.parallel.sequence_cut import SequenceCut

METHODS = {"allgather": AllGatherAttention, "ring": RingAttention, "ulysses": UlyssesAttention}


def apply_context_parallel(
    model: nn.Module, attention_units: tuple[str, ...], mesh: DeviceMesh, parallelism: Parallelism
) -> None:
    """Let attention cover the whole sequence, of which each rank of the one-dimensional `mesh` holds `local_positions`.

    Each of `attention_units` is replaced by a module without parameters. Its inputs and outputs are the same, for the
    rank's part of the sequence: q (batch, heads, part, head_dim), k and v with as many heads or fewer.
    """
    group_name = mesh.get_group().group_name
    cut = _cut(mesh.get_local_rank(), mesh.size(), parallelism.context_parallel_load_balancer)
    method = METHODS[parallelism.context_parallel_method]
    for name in attention_units:
        model.set_submodule(name, method(model.get_submodule(name), cut, group_name))


def local_positions(seq_len: int, rank: int, degree: int, load_balancer: str | None) -> Tensor:
    """The positions of the tokens of `rank` in the whole sequence: int64, shape (seq_len / degree,), on the host.

    Raises:
        ValueError: the sequence does not divide into equal chunks, or the load balancer is unknown.
    """
    cut = _cut(rank, degree, load_balancer)
    if seq_len % (degree * cut.chunks):
        raise ValueError(f"{seq_len} tokens do not divide into {degree * cut.chunks} equal pieces")
    return cut.positions(seq_len // degree)


def _cut(rank: int, degree: int, load_balancer: str | None) -> SequenceCut:
    if load_balancer not in ("headtail", None):
        raise ValueError(f"no load balancer {load_balancer!r} for causal attention: headtail, or None")
    return SequenceCut(rank, degree, chunks=2 if load_balancer == "headtail" and degree > 1 else 1)
