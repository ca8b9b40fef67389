"""Tensor parallelism: the ranks of one mesh axis share every matrix product (arXiv 1909.08053).

It uses PyTorch's parallel styles, one for each `TensorCut` that the model declares:

| cut       | torch's style                        | communication, forward (backward: the reverse)           |
|-----------|--------------------------------------|-----------------------------------------------------------|
| embedding | `RowwiseParallel`                    | reduce-scatter along the sequence                         |
| norm      | `SequenceParallel`                   | nothing                                                   |
| gather    | `PrepareModuleInput`                 | all-gather along the sequence                             |
| columns   | `ColwiseParallel`                    | nothing                                                   |
| rows      | `RowwiseParallel`                    | reduce-scatter along the sequence                         |
| logits    | `ColwiseParallel`                    | all-gather along the sequence; of logits on request       |

Without sequence parallelism (arXiv 2205.05198) each pair of a reduce-scatter and an all-gather is one all-reduce.

Between blocks, hidden states are plain local tensors. All parameters become DTensors on one mesh, also the replicated
ones. An operation over all of them, such as torch's norm of all gradients, does not accept a mixture, and the global
norm must count a replicated parameter once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from quadriga.comm.collectives import split_collectives_of
from quadriga.config.schema import Parallelism
from quadriga.errors import Problem, UserError
from quadriga.models.plan import TensorCut

SEQUENCE, FEATURES = Shard(1), Shard(-1)  # of hidden states (batch, seq, features)
WHOLE = Replicate()


def apply_tensor_parallel(
    model: nn.Module,
    cuts: tuple[TensorCut, ...],
    mesh: DeviceMesh,
    parallelism: Parallelism,
    *,
    returns_hidden_states: bool = False,
) -> None:
    """Shard `model` over the one-dimensional `mesh`, in place. It may be on meta, or a pipeline stage; names do not
    change.

    `returns_hidden_states`: the output layer returns its input, gathered, as a DTensor; the loss computes the logits.

    Gradients of replicated parameters are `Partial`, with one summand per rank. `fully_shard`, applied later, reduces
    them.

    Raises:
        UserError: `enable_async_tensor_parallel` on a device without symmetric memory.
    """
    hidden = SEQUENCE if parallelism.enable_sequence_parallel else WHOLE
    logits: Placement | None = WHOLE if parallelism.disable_loss_parallel else FEATURES
    if returns_hidden_states:
        logits = None
    for cut in cuts:
        module = model.get_submodule(cut.module)
        _cut(module, cut.style, mesh, hidden, logits)
        if "." not in cut.module:  # not within a block
            module.register_forward_hook(plain_output)
    if parallelism.enable_async_tensor_parallel:
        _overlap_communication(mesh)


def loss_context(mesh: DeviceMesh, parallelism: Parallelism) -> Callable[[], AbstractContextManager[None]]:
    """The context manager for the loss and its backward pass.

    With `loss_parallel`, the cross-entropy of logits that are sharded along the vocabulary sends three numbers per
    token instead of all logits.
    """
    if mesh.size() > 1 and not parallelism.disable_loss_parallel:
        return loss_parallel
    return nullcontext


def _cut(module: nn.Module, style: str, mesh: DeviceMesh, hidden: Placement, logits: Placement | None) -> None:
    if style == "embedding":
        parallelize_module(module, mesh, RowwiseParallel(input_layouts=WHOLE, output_layouts=hidden))
    elif style == "norm" and hidden == SEQUENCE:
        parallelize_module(module, mesh, SequenceParallel(sequence_dim=SEQUENCE.dim, use_local_output=True))
    elif style == "norm":
        distribute_module(module, mesh)  # replicates its parameters
        _convert(module, mesh, takes=WHOLE, wants=WHOLE, makes=WHOLE, gives=WHOLE)
    elif style == "gather":
        parallelize_module(module, mesh, _gather_first_input(module, hidden))
    elif style == "columns":
        parallelize_module(module, mesh, ColwiseParallel())
    elif style == "rows":
        parallelize_module(module, mesh, RowwiseParallel(output_layouts=hidden))
    elif style == "logits":
        _cut_logits(module, mesh, hidden, logits)
    else:
        raise ValueError(f"no such tensor cut: {style}")


def _gather_first_input(module: nn.Module, hidden: Placement) -> PrepareModuleInput:
    """Gather the first argument, the hidden states. The others, such as rotary tables, are already replicated.

    The module gets a DTensor, so that the gradients of all its children are added before they are sent.
    """
    others = (None,) * (len(inspect.signature(module.forward).parameters) - 1)
    return PrepareModuleInput(input_layouts=(hidden, *others), desired_input_layouts=(WHOLE, *others))


def _cut_logits(module: nn.Module, mesh: DeviceMesh, hidden: Placement, logits: Placement | None) -> None:
    """Return logits as a DTensor that is sharded along the vocabulary, or gathered as a plain tensor.

    With `logits=None` the module returns hidden states, gathered, as a DTensor.
    """
    # A tied output layer multiplies by the embedding's matrix, which is sharded by rows.
    tied = next(module.parameters(), None) is None
    if tied and logits is not None:
        _convert(module, mesh, takes=hidden, wants=WHOLE, makes=FEATURES, gives=logits)
    elif tied:
        parallelize_module(module, mesh, PrepareModuleInput(input_layouts=hidden, desired_input_layouts=WHOLE))
    else:
        style = ColwiseParallel(input_layouts=hidden, output_layouts=logits or WHOLE, use_local_output=logits == WHOLE)
        parallelize_module(module, mesh, style)


def _convert(
    module: nn.Module, mesh: DeviceMesh, *, takes: Placement, wants: Placement, makes: Placement, gives: Placement
) -> None:
    """Redistribute the input and output of a module; a replicated output is a plain tensor."""
    parallelize_module(module, mesh, PrepareModuleInput(input_layouts=takes, desired_input_layouts=wants))
    style = PrepareModuleOutput(output_layouts=makes, desired_output_layouts=gives, use_local_output=gives == WHOLE)
    parallelize_module(module, mesh, style)


class _PlainTensor(torch.autograd.Function):
    """The same data as a plain tensor that is complete and no view of another. Copies nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def plain_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook for modules outside of blocks: converts their output to a plain tensor; a DTensor is unchanged.

    The embedding's output is an unfinished collective (`AsyncCollectiveTensor`). A compiled block with such an input
    computes wrong gradients or fails in the backward pass. The wait costs an eager block nothing, because its first
    operation needs the values. Other outputs are views of a DTensor, on which the hooks of `fully_shard` can get lost.
    """
    if isinstance(output, DTensor):
        return output
    own: Tensor = _PlainTensor.apply(output)
    return own


def _overlap_communication(mesh: DeviceMesh) -> None:
    """Let inductor split each product, and send one part while it computes the next (arXiv 2305.06942)."""
    if mesh.device_type != "cuda":
        raise UserError(
            Problem(
                "parallelism.enable_async_tensor_parallel",
                f"the overlap needs symmetric memory of GPUs, but this run is on {mesh.device_type}",
                "true",
                fix="set it to false",
            )
        )
    torch._inductor.config._micro_pipeline_tp = True
    split_collectives_of(mesh.get_group())
