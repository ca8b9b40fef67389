"""The state of a model and its optimizer for a checkpoint: tensors, with the same names on every layout.

Hyperparameters of the optimizer are not saved. They come from the configuration and the schedule, so that a resume
never silently undoes a changed learning rate.
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
WORDS = 624  # in the state of a Mersenne Twister
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # inserted into names by compile and recompute


class ModelState:
    """Parameters and persistent buffers of all model parts of this rank, by their full names."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._parts = tuple(parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies; sharded tensors as DTensors."""
        return {
            strip_wrappers(name): value.detach() for part in self._parts for name, value in part.state_dict().items()
        }

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None:
        _copy(self.state_dict(), loaded)


class OptimizerState:
    """Moments and step counts, named `NAME.KEY` (`layers.0.attention.wq.weight.exp_avg`)."""

    def __init__(self, parts: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        named = (pair for part in parts for pair in part.named_parameters())
        self._names: dict[torch.Tensor, str] = {parameter: strip_wrappers(name) for name, parameter in named}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, not copies. Before the first step, they are created as zeros."""
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
    """The random generators of this rank, named `RANK.GENERATOR`: of torch, its device, Python and NumPy. A run on CPU
    does not save or load that of CUDA, even on a machine with a GPU, because this would initialize CUDA.

    Training itself draws no random numbers. Code that is added and does so continues with the same generators.
    """

    def __init__(self, rank: int, device: torch.device = CPU) -> None:
        self._rank, self._device = rank, device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the states: uint8 or int64, one dimension."""
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
        """Sets the generators in `loaded`; others are unchanged. Raises UserError if a state is not valid for its
        generator."""
        for name, state in loaded.items():
            generator = name.partition(".")[2]
            try:
                self._restore(generator, state)
            except (ValueError, OverflowError, RuntimeError) as error:
                what = f"the value in the checkpoint is not a state of a random generator: {shortened(error, 200)}"
                fix = (
                    "exclude the generators (--checkpoint.exclude_from_loading '[\"random\"]'), "
                    "which then start anew; or start from another checkpoint (--checkpoint.load_step)"
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
            if not 0 <= position <= WORDS:  # NumPy does not check it, and would read out of bounds
                raise ValueError(f"position {position} of {WORDS}")
            np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
        elif generator == "cuda" and self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)


def _check_torch(state: torch.Tensor) -> None:
    """Checks the state of torch's CPU generator: seed (8 bytes), number of words left (4), flag (4), next word (8), all
    words, and more. torch does not check that so many words are left, and would read out of bounds."""
    left, following = struct.unpack_from("<i4xQ", state.numpy().tobytes(), 8)
    if left + following > WORDS + 1:
        raise ValueError(f"{left} words left from word {following} on, of {WORDS}")


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _make_state(optimizer: Optimizer) -> None:
    """Creates the state of an optimizer, which is created in its first step: takes a step with learning rate 0, then
    sets the state to zero."""
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
