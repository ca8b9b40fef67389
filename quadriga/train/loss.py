"""The loss of a run: cross-entropy, its sum over micro-batches and ranks, and how it is computed in chunks.

**In chunks** (`training.loss_chunks`): the output layer and the loss run on one chunk of the tokens at a time. Logits
are the largest tensor of a step: tokens x vocabulary, with their float32 copy, its logarithms and the gradients of all
of them. Only one number per token, the loss, is needed of them. So the tokens of a micro-batch are split into chunks,
and each chunk runs forward *and* backward through the output layer and the loss before the next chunk begins. Only its
loss and two gradients are kept: those of its hidden states and of the output matrix. Nothing is computed twice: the
later backward pass only multiplies the two gradients by the incoming gradient (1 in training).

In bytes, with T tokens on a rank, n chunks, width d, v rows of the output matrix on this rank (under tensor parallelism
its part of the vocabulary, or the whole vocabulary if logits are gathered), c bytes per number in the compute dtype:

| alive                                    | all at once           | in n chunks                                 |
|------------------------------------------|-----------------------|---------------------------------------------|
| logits, float32 copy, logarithms         | T v (c + 8)           | T/n v (c + 8)                               |
| logarithms, gradients of both (on a CPU, | T v 12 (8), backward  | T/n v 12 (8), still in the forward pass     |
| of the logits alone)                     |                       |                                             |
| gradient of the hidden states            | T d c                 | T d c, from the forward pass on             |
| gradient of the output matrix            | v d c                 | v d 4 (the sum) + v d c (of one chunk)      |

The sum over the chunks is in float32, because in bfloat16 each addition would round it. It is rounded once, to c bytes,
at the end of the forward pass. A schedule that runs several micro-batches forward before the first one runs backward
(GPipe) keeps (T d + v d) c bytes for each of them; 1F1B keeps them for one.

The hidden states are gathered (sequence parallelism) once per micro-batch, not once per chunk. The model's output layer
returns its input, and the loss computes the logits. The weights are available there, because `fully_shard` keeps the
output layer's unit gathered until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from quadriga.comm.mesh import Mesh
from quadriga.config import Run
from quadriga.config.schema import Compile
from quadriga.data.loader import IGNORE
from quadriga.log import logger
from quadriga.models import registry
from quadriga.tensors import to_local

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Divisor:
    """The number by which the loss divides. With documents, each step sets it to the number of labels that count."""

    value: int


def build_loss(run: Run, device: torch.device, parts: Sequence[nn.Module], divisor: Divisor) -> Loss:
    """The loss as a function of the model's output and the labels: the summed cross-entropy divided by `divisor`."""
    gathered = run.config.parallelism.disable_loss_parallel
    sliced = run.spec.degrees.tp > 1 and not gathered
    cross_entropy = compiled_cross_entropy(run.config.compile, sliced_on_cpu=sliced and device.type == "cpu")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        total = cross_entropy(logits, labels)  # a DTensor if the logits are sharded; all tp ranks have the same loss
        return (total.full_tensor() if isinstance(total, DTensor) else total) / divisor.value

    output = chunked_output(run)
    if output is None:
        return loss
    return chunked_loss(loss, parts, output, loss_chunks=run.config.training.loss_chunks, gather_logits=gathered)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy in nats summed over tokens, in float32.

    Args:
        logits: (batch, seq, vocab), any float dtype.
        labels: (batch, seq) int64; `IGNORE` is not counted.

    Returns:
        float32, shape ().
    """
    rows, labels = logits.flatten(0, 1).float(), labels.flatten()
    if rows.device.type == "cpu" and not isinstance(rows, DTensor) and not torch.compiler.is_compiling():
        total: Tensor = _SummedCrossEntropy.apply(rows, labels)
        return total
    return F.cross_entropy(rows, labels, ignore_index=IGNORE, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` on a CPU: the same loss, to the bit, and a gradient that is computed in one tensor.

    torch writes a matrix that is zero except for the labels, and then the gradient. Here the softmax becomes the
    gradient: softmax x above, less `above` at the label. This takes less time (`benchmarks/loss_speed.py`), and one
    tensor less of the size of the logits. Elements differ from torch's in the last bits, because its CPU kernel
    approximates the exponential.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor) -> Tensor:
        log_probs = rows.log_softmax(-1)
        ctx.save_for_backward(log_probs, labels)
        return F.nll_loss(log_probs, labels, ignore_index=IGNORE, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        log_probs, labels = ctx.saved_tensors
        counted = labels != IGNORE
        factor, at = (above * counted).unsqueeze(1), labels.where(counted, 0).unsqueeze(1)
        return log_probs.exp().mul_(factor).scatter_add_(1, at, -factor), None


def compiled_cross_entropy(section: Compile, sliced_on_cpu: bool) -> Loss:
    """`summed_cross_entropy`, compiled if `section` requests it.

    It is not compiled by inductor if logits are sharded along the vocabulary on a CPU (`sliced_on_cpu`). There
    inductor's code of torch 2.13 computes a wrong loss without an error for some numbers of tokens (4 and 8 without
    gradients, 22 with).

    Each number of tokens is compiled separately. A run has few: two if the loss is chunked, and those of validation. A
    dynamic graph fails in torch 2.13 on logits that are DTensors (infinite recursion).
    """
    if not section.compiles("loss"):
        return summed_cross_entropy
    if sliced_on_cpu and section.backend == "inductor":
        logger.info("the loss is not compiled: on a CPU, inductor computes a wrong loss of sharded logits")
        return summed_cross_entropy
    return cast(Loss, torch.compile(summed_cross_entropy, backend=section.backend, fullgraph=True, dynamic=False))


@dataclass(frozen=True)
class StepTotals:
    """One step's numbers over all ranks: tensors of shape () on the device, equal on all ranks to the bit."""

    loss: Tensor  # float64: mean over the tokens of the global batch, in nats
    max_loss: Tensor  # float64: the largest mean over the tokens of one rank, in nats
    grad_norm: Tensor  # float32: L2 norm of all gradients, before clipping
    finite: Tensor  # bool: whether the loss and the norm of every rank are finite
    bad_records: Tensor | None  # float64: records skipped so far; None if skipping is off
    attention: AttentionWork | None = None  # with documents


class LocalWork(NamedTuple):
    """This rank's part of a step with documents: its share of the labels that count, and how many pairs of a query and
    a key its tokens see in each layer."""

    share: float
    seen: int


class AttentionWork(NamedTuple):
    """Over all ranks, float64: the pairs of a query and a key that are seen in each layer of a step, and how many times
    the mean of the ranks the largest one has."""

    seen: Tensor
    imbalance: Tensor


def all_reduce_loss(
    local_loss: Tensor,
    local_norm: Tensor,
    mesh: Mesh,
    local_bad_records: int | None = None,
    work: LocalWork | None = None,
) -> StepTotals:
    """Reduce all numbers in one collective.

    All ranks use the first rank's norm. Each replica sums the squares by itself, and a difference in the last bit would
    make the weights of the replicas differ.

    Args:
        local_loss: this rank's part of the loss, float64, shape ().
        local_norm: the gradient norm as this rank computed it, shape ().
        local_bad_records: records skipped in rows that no other rank counts; None on all ranks if skipping is off.
        work: with documents; None on all ranks without.
    """
    extra = [*(work or ()), *([] if local_bad_records is None else [local_bad_records])]
    numbers = [torch.full_like(local_loss, number) for number in extra]
    by_rank = mesh.all_gather_numbers(torch.stack((local_loss, local_norm.to(local_loss), *numbers)))
    rows = mesh.loss_rows(by_rank)
    losses = rows[:, 0]
    parts = mesh.batch_degree * mesh.cp.size()  # of the batch; ranks without a loss have 0
    means, attention = losses * parts, None
    if work is not None:
        share, seen = rows[:, 2], rows[:, 3]
        means = torch.where(share > 0, losses / share.clamp(min=1e-300), 0)
        # The ranks of a pipeline have the same rows.
        attention = AttentionWork(seen.sum() / mesh.pp.size(), seen.max() / seen.mean().clamp(min=1))
    return StepTotals(
        loss=losses.sum(),
        max_loss=means.max(),
        grad_norm=by_rank[0, 1].float(),
        finite=by_rank.isfinite().all(),
        bad_records=None if local_bad_records is None else by_rank[:, -1].sum(),
        attention=attention,
    )


def chunked_output(run: Run) -> str | None:
    """The name of the output layer if it returns hidden states, because the loss computes the logits in chunks."""
    return registry.parallel_plan(run.spec.model).logits_unit if run.config.training.loss_chunks > 1 else None


def chunked_loss(
    loss: Loss, parts: Sequence[nn.Module], output: str, *, loss_chunks: int, gather_logits: bool = False
) -> Loss:
    """The same loss as a function of hidden states instead of logits.

    Args:
        loss: maps logits (1, tokens, vocab) and labels (1, tokens) to the *sum* over tokens, plain, of shape ().
        parts: the model, or the stages of this rank, whose output layer returns hidden states.
        output: full name of the module that computes logits by `forward(hidden states)`, from `weight` alone.
        loss_chunks: number of chunks. Their lengths differ by at most one token; with fewer tokens, one per chunk.
        gather_logits: gather logits that are sharded along the vocabulary before `loss`.

    Returns:
        A function of hidden states (batch, seq, dim) and int64 labels (batch, seq). If autograd is on, its forward pass
        also computes the gradients; otherwise it only computes the logits of each chunk and drops them.
    """
    module = next((module for part in parts for name, module in part.named_modules() if name == output), None)
    if module is None:
        return loss  # never called on a rank without the last stage
    make_logits = partial(type(module).forward, module)

    def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = make_logits(hidden.unsqueeze(0))
        if gather_logits and isinstance(logits, DTensor):
            logits = logits.full_tensor()
        return loss(logits, labels.unsqueeze(0))

    def total_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _with_gradients(chunk_loss, hidden, cast(Tensor, module.weight), labels, loss_chunks)
        tokens, labels = hidden.flatten(0, 1), labels.flatten()
        return torch.stack(
            [chunk_loss(tokens[cut], labels[cut]) for cut in _chunk_slices(len(labels), loss_chunks)]
        ).sum()

    return total_loss


def _with_gradients(chunk_loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, loss_chunks: int) -> Tensor:
    """The loss of all tokens; its gradients are computed in the same pass."""
    tokens, labels = hidden.detach().flatten(0, 1), labels.flatten()
    losses, of_hidden, of_weight = [], torch.empty_like(to_local(tokens)), None
    for cut in _chunk_slices(len(labels), loss_chunks):
        chunk = tokens[cut].requires_grad_()
        loss = chunk_loss(chunk, labels[cut])
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, (chunk, weight))
        as_hidden, as_weight = _rebuild_as(gradients[0], hidden), _rebuild_as(gradients[1], weight)
        of_hidden[cut] = to_local(gradients[0])
        of_weight = _accumulate(of_weight, to_local(gradients[1]))
        del loss, gradients  # else they stay alive until the next chunk's replace them
    assert of_weight is not None, "a batch without tokens"
    total = torch.stack(losses).sum()
    # Autograd runs the newest node first. So the matrix has its gradient before the backward pass reaches the hook in
    # which `fully_shard` reduces it.
    upper: Tensor = _PrecomputedGradient.apply(total, hidden, of_hidden.view(hidden.shape), as_hidden)
    lower: Tensor = _PrecomputedGradient.apply(torch.zeros_like(total), weight, of_weight.to(weight.dtype), as_weight)
    return upper + lower


class _PrecomputedGradient(torch.autograd.Function):
    """A number whose gradient with respect to `tensor` is known: `local` is this rank's part, `rebuild` wraps it.

    There is one node per tensor, and torch's own addition joins them. A schedule that splits the backward pass starts
    its second part at the node where the paths to inputs and weights meet, and in torch 2.11 that node must not be a
    Python function. The schedule may call `backward` twice; saved tensors do not change.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: Tensor, local: Tensor, rebuild: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(local)
        ctx.rebuild = rebuild
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (local,) = ctx.saved_tensors
        return None, ctx.rebuild(local * above), None, None


def _chunk_slices(tokens: int, loss_chunks: int) -> Iterator[slice]:
    """Ranges whose lengths differ by at most one token, so that compiled code has at most two input lengths."""
    ends = [tokens * chunk // loss_chunks for chunk in range(loss_chunks + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends) if begin < end)


def _accumulate(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum, in float32 or wider; `total` is modified in place."""
    return more.to(torch.promote_types(more.dtype, torch.float32)) if total is None else total.add_(more)


def _rebuild_as(gradient: Tensor, whole: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from this rank's part to a gradient of `whole`, with the placements of `gradient`, that of a chunk."""
    if not isinstance(gradient, DTensor):
        return lambda local: local
    return partial(
        DTensor.from_local,
        device_mesh=gradient.device_mesh,
        placements=gradient.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
