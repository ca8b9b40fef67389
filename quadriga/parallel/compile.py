"""torch.compile: one block at a time, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from quadriga.config.schema import Compile
from quadriga.log import logger

F = TypeVar("F", bound=Callable[..., torch.Tensor])


def apply_compile(model: nn.Module, blocks: tuple[str, ...], section: Compile) -> None:
    """Compile each of `blocks` in place; names of modules and parameters stay.

    Block by block, since equal blocks share one compilation: the time to the first step does not grow with the depth.
    A block that cannot be captured whole is an error, not a slower run.
    """
    for name in blocks:
        model.get_submodule(name).compile(backend=section.backend, fullgraph=True)


def maybe_compile_loss(loss: F, section: Compile, *, sliced_on_cpu: bool = False) -> F:
    """The loss function, compiled where `[compile]` asks for it.

    Not by inductor where logits are cut along the vocabulary on a CPU (`sliced_on_cpu`): for some numbers of tokens its
    code computes a wrong loss there without a word, in torch 2.13 (of 4 and 8 tokens without gradients, of 22 with).

    Once for each number of tokens, of which a run has few: two where the loss is made in chunks, and those of
    validation. One graph for any number of them fails in torch 2.13 on logits that are DTensors (endless recursion).
    """
    if not (section.enable and "loss" in section.components):
        return loss
    if sliced_on_cpu and section.backend == "inductor":
        logger.info("the loss is not compiled: on a CPU inductor gets it wrong where logits are cut")
        return loss
    return cast(F, torch.compile(loss, backend=section.backend, fullgraph=True, dynamic=False))
