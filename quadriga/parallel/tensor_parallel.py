"""Tensor parallelism: every matrix product is shared by the ranks of one mesh axis (arXiv 1909.08053).

PyTorch's parallel styles do the work, one for each `TensorCut` that the model declares:

| cut       | torch's style                        | on the wire, forward (backward: the reverse)             |
|-----------|--------------------------------------|-----------------------------------------------------------|
| embedding | `RowwiseParallel`                    | reduce-scatter along the sequence                         |
| norm      | `SequenceParallel`                   | nothing                                                   |
| gather    | `PrepareModuleInput`                 | all-gather along the sequence                             |
| columns   | `ColwiseParallel`                    | nothing                                                   |
| rows      | `RowwiseParallel`                    | reduce-scatter along the sequence                         |
| logits    | `ColwiseParallel`                    | all-gather along the sequence; of the logits if asked for |

Without sequence parallelism (arXiv 2205.05198) each pair of a reduce-scatter and an all-gather is one all-reduce.

Between blocks hidden states are plain tensors: what this rank holds of them. All parameters become DTensors on one
mesh, also those that every rank holds whole: one operation over all of them, such as torch's norm of all gradients,
takes no mixture, and the global norm counts such a parameter once.
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
    loss_chunks: int = 1,
) -> None:
    """Cut `model` over the one-dimensional `mesh`, in place. It may be on meta, or a pipeline stage; names stay.

    With `loss_chunks` above 1 hidden states come out of it, whole, as a DTensor: `chunked_loss` makes logits of them.

    Gradients of parameters that are whole on every rank come out as sums to be made (`Partial`), one part a rank:
    `fully_shard`, applied later, makes them.

    Raises:
        UserError: `enable_async_tensor_parallel` on a device that has no symmetric memory.
    """
    hidden = SEQUENCE if parallelism.enable_sequence_parallel else WHOLE
    logits: Placement | None = WHOLE if parallelism.disable_loss_parallel else FEATURES
    if loss_chunks > 1:
        logits = None
    for cut in cuts:
        module = model.get_submodule(cut.module)
        _cut(module, cut.style, mesh, hidden, logits)
        if "." not in cut.module:  # not within a block
            module.register_forward_hook(plain_output)
    if parallelism.enable_async_tensor_parallel:
        _overlap_communication(mesh)


def loss_context(mesh: DeviceMesh, parallelism: Parallelism) -> Callable[[], AbstractContextManager[None]]:
    """What to enter around the loss and its backward pass.

    With `loss_parallel` the cross-entropy of logits that are cut along the vocabulary sends three numbers a
    token instead of the vocabulary.
    """
    if mesh.size() > 1 and not parallelism.disable_loss_parallel:
        return loss_parallel
    return nullcontext


def plain_loss(loss: Tensor) -> Tensor:
    """A loss of logits that were cut, as a plain tensor; gradients pass. All ranks of the mesh know the same loss."""
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def _cut(module: nn.Module, style: str, mesh: DeviceMesh, hidden: Placement, logits: Placement | None) -> None:
    if style == "embedding":
        parallelize_module(module, mesh, RowwiseParallel(input_layouts=WHOLE, output_layouts=hidden))
    elif style == "norm" and hidden == SEQUENCE:
        parallelize_module(module, mesh, SequenceParallel(sequence_dim=SEQUENCE.dim, use_local_output=True))
    elif style == "norm":
        distribute_module(module, mesh)  # its parameters: whole on every rank
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
    """Hidden states come first; what else `forward` takes, such as tables of positions, is whole already.

    The module gets a DTensor: gradients of all its children are added up before they are sent.
    """
    others = (None,) * (len(inspect.signature(module.forward).parameters) - 1)
    return PrepareModuleInput(input_layouts=(hidden, *others), desired_input_layouts=(WHOLE, *others))


def _cut_logits(module: nn.Module, mesh: DeviceMesh, hidden: Placement, logits: Placement | None) -> None:
    """Logits come out as a DTensor that is cut along the vocabulary, or as a plain whole tensor.

    None: it is hidden states that come out, gathered, as a DTensor.
    """
    # A tied output layer multiplies by the embedding's matrix, of which each rank holds some rows.
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
    """Change tensors on the way in and out; what is given whole is given as a plain tensor."""
    parallelize_module(module, mesh, PrepareModuleInput(input_layouts=takes, desired_input_layouts=wants))
    style = PrepareModuleOutput(output_layouts=makes, desired_output_layouts=gives, use_local_output=gives == WHOLE)
    parallelize_module(module, mesh, style)


class _PlainTensor(torch.autograd.Function):
    """The same numbers in a tensor that has arrived and is a view of no other. Copies nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def plain_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """What the ends of the model return: a plain tensor, in which nothing of the way it came is left.

    The embedding's output is still on its way (`AsyncCollectiveTensor`), and a compiled block that is given such a
    tensor computes wrong gradients or fails in the backward pass. An eager block loses nothing by waiting here: its
    first operation needs the numbers. Other outputs are views of a DTensor, on which the hooks of `fully_shard` can
    get lost.
    """
    if isinstance(output, DTensor):
        return output
    own: Tensor = _PlainTensor.apply(output)
    return own


def _overlap_communication(mesh: DeviceMesh) -> None:
    """Let inductor cut each product into pieces that are sent while the next one is computed (arXiv 2305.06942)."""
    if mesh.device_type != "cuda":
        raise UserError(
            Problem(
                "parallelism.enable_async_tensor_parallel",
                f"the overlap goes through symmetric memory of GPUs, and this run is on {mesh.device_type}",
                "true",
                fix="set it to false",
            )
        )
    torch._inductor.config._micro_pipeline_tp = True
