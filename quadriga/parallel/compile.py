"""torch.compile: one block at a time, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from quadriga.config.schema import Compile

F = TypeVar("F", bound=Callable[..., torch.Tensor])


def apply_compile(model: nn.Module, blocks: tuple[str, ...], section: Compile) -> None:
    """Compile each of `blocks` in place; names of modules and parameters stay.

    Block by block, since equal blocks share one compilation: the time to the first step does not grow with the depth.
    A block that cannot be captured whole is an error, not a slower run.
    """
    for name in blocks:
        model.get_submodule(name).compile(backend=section.backend, fullgraph=True)


def maybe_compile_loss(loss: F, section: Compile) -> F:
    """The loss function, compiled where `[compile]` asks for it."""
    if not (section.enable and "loss" in section.components):
        return loss
    return cast(F, torch.compile(loss, backend=section.backend, fullgraph=True))
