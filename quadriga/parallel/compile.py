"""torch.compile of the model, block by block, and of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from quadriga.config.schema import Compile
from quadriga.log import logger

F = TypeVar("F", bound=Callable[..., torch.Tensor])


def apply_compile(model: nn.Module, blocks: tuple[str, ...], section: Compile) -> None:
    """Compile each of `blocks` in place; modules and parameters keep their names.

    Equal blocks share one compilation, so the time to the first step does not grow with the depth. A graph break in a
    block is an error, because it would make the run slower.
    """
    for name in blocks:
        model.get_submodule(name).compile(backend=section.backend, fullgraph=True)


def maybe_compile_loss(loss: F, section: Compile, *, sliced_on_cpu: bool = False) -> F:
    """The loss function, compiled if `[compile]` requests it.

    It is not compiled by inductor if logits are sharded along the vocabulary on a CPU (`sliced_on_cpu`). There
    inductor's code of torch 2.13 computes a wrong loss without an error for some numbers of tokens (4 and 8 without
    gradients, 22 with).

    Each number of tokens is compiled separately. A run has few: two if the loss is chunked, and those of validation. A
    dynamic graph fails in torch 2.13 on logits that are DTensors (infinite recursion).
    """
    if not (section.enable and "loss" in section.components):
        return loss
    if sliced_on_cpu and section.backend == "inductor":
        logger.info("the loss is not compiled: on a CPU, inductor computes a wrong loss of sharded logits")
        return loss
    return cast(F, torch.compile(loss, backend=section.backend, fullgraph=True, dynamic=False))
