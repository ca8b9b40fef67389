"""What a checkpoint takes of a model and its optimizer: tensors under names that are the same on every layout.

The optimizer's hyper-parameters are not among them: they come from the configuration and the schedule, so that a
changed learning rate is never silently undone by a resume.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from quadriga.errors import Problem, UserError, shortened

CPU = torch.device("cpu")
WORDS = 624  # of the state of a Mersenne Twister
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # what compile and recompute put into names


class ModelState:
    """Parameters and persistent buffers of all model parts of this rank, by their full names."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._parts = tuple(parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies; sharded ones as DTensors."""
        return {
            strip_wrappers(name): value.detach() for part in self._parts for name, value in part.state_dict().items()
        }

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        _copy(self.state_dict(), loaded)


class OptimizerState:
    """Moments and step counts as `NAME.KEY` (`layers.0.attention.wq.weight.exp_avg`)."""

    def __init__(self, parts: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        named = (pair for part in parts for pair in part.named_parameters())
        self._names: dict[torch.Tensor, str] = {parameter: strip_wrappers(name) for name, parameter in named}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies. Before the first step they are made, as zeros."""
        for optimizer in self._optimizers:
            if not optimizer.state:
                _make_state(optimizer)
        return {
            f"{self._names[parameter]}.{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        _copy(self.state_dict(), loaded)


class RandomState:
    """The random number generators of this rank: torch's, those of its device, Python's and NumPy's, as
    `RANK.GENERATOR`. A run on CPU saves and loads none of CUDA, also where there is a GPU: asking would open it.

    Training draws no random numbers of its own; whoever adds a part that does finds them where the run stood.
    """

    def __init__(self, rank: int, device: torch.device = CPU) -> None:
        self._rank, self._device = rank, device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies, for generators do not give their memory away."""
        version, words, _ = random.getstate()
        numpy: Any = np.random.get_state(legacy=True)
        states = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor([version, *words], dtype=torch.int64),
            "numpy": torch.tensor([int(numpy[2]), *map(int, numpy[1])], dtype=torch.int64),
        }
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return {f"{self._rank}.{name}": state for name, state in states.items()}

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Generators that are not among them stay as they are. Raises UserError where a state is none of its
        generator."""
        for name, state in loaded.items():
            generator = name.partition(".")[2]
            try:
                self._restore(generator, state)
            except (ValueError, OverflowError, RuntimeError) as error:
                what = f"what the checkpoint holds is no state of a random number generator: {shortened(error, 200)}"
                fix = (
                    "leave the generators out (--checkpoint.exclude_from_loading '[\"random\"]'): "
                    "they then begin anew; or start from another checkpoint (--checkpoint.load_step)"
                )
                raise UserError(Problem(f"random.{name}", what, fix=fix)) from error

    def _restore(self, generator: str, state: torch.Tensor) -> None:
        if generator == "torch":
            _check_torch(state)
            torch.set_rng_state(state)
        elif generator == "python":
            version, *words = state.tolist()
            random.setstate((version, tuple(words), None))
        elif generator == "numpy":
            position, *keys = state.tolist()
            if not 0 <= position <= WORDS:  # NumPy does not look: the next draw would read memory of others
                raise ValueError(f"position {position} of {WORDS}")
            np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
        elif generator == "cuda" and self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)


def _check_torch(state: torch.Tensor) -> None:
    """Of torch's CPU generator: bytes of a seed (8), how many words are left (4), a flag (4), the next word (8), all
    words and more. torch does not look whether as many are left, and would read behind them."""
    left, following = struct.unpack_from("<i4xQ", state.numpy().tobytes(), 8)
    if left + following > WORDS + 1:
        raise ValueError(f"{left} words left from word {following} on, of {WORDS}")


def strip_wrappers(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _make_state(optimizer: Optimizer) -> None:
    """An optimizer makes its state in its first step: take one that moves nothing, then set the state to zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [p.grad for p in parameters]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


@torch.no_grad()
def _copy(own: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> None:
    if own.keys() != loaded.keys():
        raise KeyError(f"names differ: {sorted(own.keys() ^ loaded.keys())[:5]}")
    for name, value in own.items():
        value.copy_(loaded[name])
