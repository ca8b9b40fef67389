"""Initial weights by (seed, parameter name, block of rows) alone, so that every layout starts from equal ones.

A parameter is drawn in blocks of whole rows, at most 2**18 elements each, every block from a generator of its own:
PCG64, keyed by a 128-bit hash of those three. (`torch.Generator` on CPU takes 32 bits of a seed, too few for the 1.6
million blocks of 405B.) A rank draws the blocks that overlap what it holds, keeps its part, and needs one block more a
thread. All drawing is done on the CPU, also for a GPU, so that a rehearsal starts from the weights of the real run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from quadriga.models.plan import ParameterPlan

BLOCK_ELEMENTS = 2**18
_CENTRE = 1 - 2**-24  # see `_to_normal`
_CHUNK = 2**15  # small enough for the nearest cache, and for PyTorch not to split it over threads of its own


def materialize(model: nn.Module, parameters: tuple[ParameterPlan, ...], seed: int, device: torch.device) -> None:
    """Give a model on meta its memory on `device` and its initial weights, drawn as `parameters` says.

    Plain parameters and DTensors of any sharding are filled alike, bit for bit the same numbers at the same places.
    Other dtypes than float32 get the float32 draw, rounded. Buffers are computed by the model's `reset_buffers`.
    Raises ValueError where the plan and the model do not name the same parameters with the same shapes.
    """
    named = dict(model.named_parameters())
    _check(named, parameters)
    model.to_empty(device=device)
    named = dict(model.named_parameters())  # to_empty may have replaced them
    with ThreadPoolExecutor(torch.get_num_threads(), "initial-weights") as pool:
        for plan in parameters:
            held = _held(named[plan.name])
            if plan.init == "ones":
                held.tensor.fill_(1.0)
            else:
                list(pool.map(partial(_fill, held, plan, seed), _blocks(plan.shape, held)))
    reset_buffers = model.reset_buffers
    assert callable(reset_buffers)
    reset_buffers()


@dataclass(frozen=True)
class _Held:
    """The part of a parameter that this rank holds: a tensor and where its first element lies in the whole."""

    tensor: Tensor
    offset: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """Rows `start` to `stop` of a parameter, the `index`-th block of it."""

    index: int
    start: int
    stop: int


def _fill(held: _Held, plan: ParameterPlan, seed: int, block: _Block) -> None:
    """Draw the block and write the part of it that is held."""
    drawn = draw(seed, plan.name, block.index, (block.stop - block.start, *plan.shape[1:]), plan.std, plan.bound)
    first = held.offset[0]
    start, stop = max(block.start, first), min(block.stop, first + held.tensor.shape[0])
    rows = slice(start - block.start, stop - block.start)
    others = (slice(begin, begin + size) for begin, size in zip(held.offset[1:], held.tensor.shape[1:], strict=True))
    held.tensor[start - first : stop - first].copy_(drawn[(rows, *others)])


def draw(seed: int, name: str, block: int, shape: tuple[int, ...], std: float, bound: float = math.inf) -> Tensor:
    """One block on the CPU, float32: normal with `std`, cut at -bound and bound. One uniform draw an element, in order.

    (Cut at 3 std, a normal distribution has a standard deviation of 0.987 std.)
    """
    key = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    drawn = torch.empty(shape)
    for chunk in drawn.view(-1).split(_CHUNK):
        generator.random(out=chunk.numpy(), dtype=np.float32)
        _to_normal(chunk, std, bound)
    return drawn


def _to_normal(uniform: Tensor, std: float, bound: float) -> None:
    """In place: what was drawn uniformly from [0, 1), float32, through the inverse of the normal distribution function.

    The draws are k / 2**24 for whole k. 2 k / 2**24 - 1 would begin at -1, where the inverse is -inf, and have a mean
    below 0; the middles of those steps, (2 k + 1) / 2**24 - 1, are exact in float32, symmetric, and end before -1 and
    1. So a distribution that is not cut ends at 5.4 standard deviations.
    """
    share = math.erf(bound / (std * math.sqrt(2)))  # of the whole distribution, which lies within the bound
    uniform.mul_(2 * share).sub_(_CENTRE * share).erfinv_().mul_(std * math.sqrt(2)).clamp_(-bound, bound)


def _blocks(shape: tuple[int, ...], held: _Held) -> Iterator[_Block]:
    """The blocks of a parameter that overlap what is held. A single row above 2**18 elements is a block of its own."""
    if held.tensor.numel() == 0:
        return
    rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    first, last = held.offset[0], held.offset[0] + held.tensor.shape[0] - 1
    for index in range(first // rows, last // rows + 1):
        yield _Block(index, index * rows, min((index + 1) * rows, shape[0]))


def _held(parameter: Tensor) -> _Held:
    """The local part of a DTensor as a box of the whole.

    It is one under FSDP over tensor parallelism too (`_StridedShard`): FSDP cuts the contiguous part that tensor
    parallelism left.
    """
    if not isinstance(parameter, DTensor):
        return _Held(parameter.detach(), (0,) * parameter.dim())
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local().detach()
    if tuple(local.shape) != tuple(shape):
        raise RuntimeError(
            f"a shard of shape {tuple(local.shape)} where {tuple(shape)} was expected: {parameter.placements}"
        )
    return _Held(local, tuple(offset))


def _check(named: dict[str, nn.Parameter], parameters: tuple[ParameterPlan, ...]) -> None:
    planned = {plan.name: plan.shape for plan in parameters}
    wrong = [f"{name} has no plan" for name in named if name not in planned]
    wrong += [f"{name} is planned but not in the model" for name in planned if name not in named]
    wrong += [
        f"{name} is {tuple(named[name].shape)}, planned {shape}"
        for name, shape in planned.items()
        if name in named and tuple(named[name].shape) != shape
    ]
    if len(planned) != len(parameters):
        wrong.append("a name is planned twice")
    if wrong:
        raise ValueError("the plan does not fit the model: " + "; ".join(wrong[:10]))
