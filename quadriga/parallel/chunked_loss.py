"""The output layer and the loss, one chunk of the tokens at a time (`training.loss_chunks`).

Logits are the largest tensor of a step: tokens x vocabulary, with their float32 copy, its logarithms and the gradients
of all of them. Only one number per token, the loss, is needed of them. So the tokens of a micro-batch are split into
chunks, and each chunk runs forward *and* backward through the output layer and the loss before the next chunk begins.
Only its loss and two gradients are kept: those of its hidden states and of the output matrix. Nothing is computed
twice: the later backward pass only multiplies the two gradients by the incoming gradient (1 in training).

In bytes, with T tokens on a rank, n chunks, width d, v rows of the output matrix on this rank (under tensor parallelism
its part of the vocabulary, or the whole vocabulary if logits are gathered), c bytes per number in the compute dtype:

| alive                                    | all at once           | in n chunks                                 |
|------------------------------------------|-----------------------|---------------------------------------------|
| logits, float32 copy, logarithms         | T v (c + 8)           | T/n v (c + 8)                               |
| logarithms, gradients of both            | T v 12, backward      | T/n v 12, still in the forward pass         |
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
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Loss = Callable[[Tensor, Tensor], Tensor]


def return_hidden_states(model: nn.Module, output: str) -> None:
    """Let the module `output` return its input, in place; its hooks still run. `model` may be a stage without it."""
    if (module := _find_module((model,), output)) is not None:
        module.forward = _identity


def chunked_loss(
    loss: Loss, parts: Sequence[nn.Module], output: str, *, loss_chunks: int, gather_logits: bool = False
) -> Loss:
    """The same loss as a function of hidden states instead of logits.

    Args:
        loss: maps logits (1, tokens, vocab) and labels (1, tokens) to the *sum* over tokens, plain, of shape ().
        parts: the model, or the stages of this rank, after `return_hidden_states`.
        output: full name of the module that computes logits by `forward(hidden states)`, from `weight` alone.
        loss_chunks: number of chunks. Their lengths differ by at most one token; with fewer tokens, one per chunk.
        gather_logits: gather logits that are sharded along the vocabulary before `loss`.

    Returns:
        A function of hidden states (batch, seq, dim) and int64 labels (batch, seq). If autograd is on, its forward pass
        also computes the gradients; otherwise it only computes the logits of each chunk and drops them.
    """
    if (module := _find_module(parts, output)) is None:
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
    losses, of_hidden, of_weight = [], torch.empty_like(_local(tokens)), None
    for cut in _chunk_slices(len(labels), loss_chunks):
        chunk = tokens[cut].requires_grad_()
        loss = chunk_loss(chunk, labels[cut])
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, (chunk, weight))
        as_hidden, as_weight = _rebuild_as(gradients[0], hidden), _rebuild_as(gradients[1], weight)
        of_hidden[cut] = _local(gradients[0])
        of_weight = _accumulate(of_weight, _local(gradients[1]))
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


def _find_module(parts: Sequence[nn.Module], name: str) -> nn.Module | None:
    found = [module for part in parts for here, module in part.named_modules() if here == name]
    return found[0] if found else None


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _chunk_slices(tokens: int, loss_chunks: int) -> Iterator[slice]:
    """Ranges whose lengths differ by at most one token, so that compiled code has at most two input lengths."""
    ends = [tokens * chunk // loss_chunks for chunk in range(loss_chunks + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends) if begin < end)


def _accumulate(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum, in float32 or wider; `total` is modified in place."""
    return more.to(torch.promote_types(more.dtype, torch.float32)) if total is None else total.add_(more)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rebuild_as(gradient: Tensor, whole: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from this rank's part to a gradient of `whole`, with the placements of `gradient`, that of a chunk."""
    if not isinstance(gradient, DTensor):
        return _identity
    return partial(
        DTensor.from_local,
        device_mesh=gradient.device_mesh,
        placements=gradient.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
