"""The output layer and the loss, one chunk of the tokens at a time (`training.loss_chunks`).

Logits are the largest tensor of a step: tokens x vocabulary, with their float32 copy, its logarithms and the gradients
of all of them. They are needed for nothing but a number a token. So the tokens of a micro-batch are cut into chunks,
and a chunk goes through the output layer and the loss forward *and* backward at once, before the next one begins. What
is left of it are its loss and two gradients, of its hidden states and of the output matrix. Nothing is computed twice:
the later backward pass only multiplies the two by what comes from above (1 in training).

In bytes, with T tokens on a rank, n chunks, width d, v rows of the output matrix on this rank (under tensor parallelism
its share of the vocabulary, or all logits where they are gathered), c bytes of a number in the computing dtype:

| alive                                    | all at once           | in n chunks                                 |
|------------------------------------------|-----------------------|---------------------------------------------|
| logits, float32 copy, logarithms         | T v (c + 8)           | T/n v (c + 8)                               |
| logarithms, gradients of both            | T v 12, backward      | T/n v 12, still in the forward pass         |
| gradient of the hidden states            | T d c                 | T d c, from the forward pass on             |
| gradient of the output matrix            | v d c                 | v d 4 (the sum) + v d c (of one chunk)      |

The sum over the chunks is made in float32, since in bfloat16 each addition would round it, and is rounded once, to c
bytes, at the end of the forward pass. A schedule that runs several micro-batches forward before the first goes backward
(GPipe) keeps (T d + v d) c bytes for each of them; 1F1B keeps them for one.

The hidden states are gathered (sequence parallelism) once and not once a chunk. The model knows nothing of it: its
output layer returns its input, and what it would have computed is computed within the loss, where its weights still
are: `fully_shard` keeps the unit that holds them until the backward pass.
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
    """Let the module `output` return its input, in place; its hooks run as ever. `model` may be a stage without it."""
    if (module := _find_module((model,), output)) is not None:
        module.forward = _identity


def chunked_loss(
    loss: Loss, parts: Sequence[nn.Module], output: str, *, loss_chunks: int, gather_logits: bool = False
) -> Loss:
    """The same loss, of hidden states instead of logits.

    Args:
        loss: maps logits (1, tokens, vocab) and labels (1, tokens) to a *sum* over tokens: plain, of shape ().
        parts: the model, or the stages of this rank; `return_hidden_states` was called on them.
        output: full name of the module that makes logits, by `forward(hidden states)` and from `weight` alone.
        loss_chunks: of as many tokens each, or of one more; with fewer tokens than chunks, of one each.
        gather_logits: hand whole logits to `loss` where the module makes them cut along the vocabulary.

    Returns:
        A function of hidden states (batch, seq, dim) and int64 labels (batch, seq). Where gradients are recorded, its
        forward pass computes them; where they are not, logits are made and let go, and nothing else.
    """
    if (module := _find_module(parts, output)) is None:
        return loss  # nobody asks a rank without the last stage for it
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
    """The loss of all tokens, whose gradients are known as soon as it is."""
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
        del loss, gradients  # they would live until the next chunk has some
    assert of_weight is not None, "a batch without tokens"
    total = torch.stack(losses).sum()
    # Autograd runs first what was made last: the matrix has its gradient before the backward pass comes to where
    # `fully_shard` sends it off.
    upper: Tensor = _PrecomputedGradient.apply(total, hidden, of_hidden.view(hidden.shape), as_hidden)
    lower: Tensor = _PrecomputedGradient.apply(torch.zeros_like(total), weight, of_weight.to(weight.dtype), as_weight)
    return upper + lower


class _PrecomputedGradient(torch.autograd.Function):
    """A number whose gradient by `tensor` is known already: `local` is what this rank holds of it, `rebuild` wraps it.

    One for each tensor, whose sum is torch's: a schedule that splits the backward pass starts the second part of it at
    the node where the way to the inputs and the way to the weights meet, which in torch 2.11 must not be a function of
    Python. It may call `backward` twice, which changes nothing that was saved.
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
    """Ranges that differ by one token at most, so that compiled code meets two lengths and not more."""
    ends = [tokens * chunk // loss_chunks for chunk in range(loss_chunks + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends) if begin < end)


def _accumulate(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum, in float32 at least; `total` is changed."""
    return more.to(torch.promote_types(more.dtype, torch.float32)) if total is None else total.add_(more)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rebuild_as(gradient: Tensor, whole: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of this rank's numbers a gradient of `whole`, spread over ranks as `gradient`, that of a chunk, is."""
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
