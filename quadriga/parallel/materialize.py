"""Initial weights as a function of (seed, parameter name, block of rows), so that all layouts start from equal weights.

A parameter is drawn in blocks of whole rows, at most 2**18 elements each. Each block has its own generator: PCG64,
seeded with a 128-bit hash of these three values. (`torch.Generator` on CPU uses only 32 bits of a seed, too few for the
1.6 million blocks of 405B.) A rank draws the blocks that overlap its shard and keeps its part. This needs memory for
one block per thread. All draws are on the CPU, also for a GPU, so a rehearsal has the initial weights of the real run.
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
_CHUNK = 2**15  # small enough for the L1 or L2 cache, and so that PyTorch does not split it over its own threads


def materialize(model: nn.Module, parameters: tuple[ParameterPlan, ...], seed: int, device: torch.device) -> None:
    """Allocate a model on meta on `device`, and draw its initial weights as planned in `parameters`.

    The values are equal bit for bit for plain parameters and for DTensors of any sharding. Other dtypes than float32
    get the rounded float32 draw. The model's `reset_buffers` computes the buffers. Raises ValueError if the plan and
    the model have different parameter names or shapes.
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
    """This rank's part of a parameter: a tensor, and the index of its first element in the whole parameter."""

    tensor: Tensor
    offset: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """Rows `start` to `stop` (exclusive) of a parameter, its block number `index`."""

    index: int
    start: int
    stop: int


def _fill(held: _Held, plan: ParameterPlan, seed: int, block: _Block) -> None:
    """Draw the block and write this rank's part of it."""
    drawn = draw(seed, plan.name, block.index, (block.stop - block.start, *plan.shape[1:]), plan.std, plan.bound)
    first = held.offset[0]
    start, stop = max(block.start, first), min(block.stop, first + held.tensor.shape[0])
    rows = slice(start - block.start, stop - block.start)
    others = (slice(begin, begin + size) for begin, size in zip(held.offset[1:], held.tensor.shape[1:], strict=True))
    held.tensor[start - first : stop - first].copy_(drawn[(rows, *others)])


def draw(seed: int, name: str, block: int, shape: tuple[int, ...], std: float, bound: float = math.inf) -> Tensor:
    """One block of `shape` on the CPU, float32: normal with `std`, truncated at -bound and bound.

    Each element takes one uniform draw, in order. (Truncated at 3 std, a normal distribution has a standard deviation
    of 0.987 std.)
    """
    key = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    drawn = torch.empty(shape)
    for chunk in drawn.view(-1).split(_CHUNK):
        generator.random(out=chunk.numpy(), dtype=np.float32)
        _to_normal(chunk, std, bound)
    return drawn


def _to_normal(uniform: Tensor, std: float, bound: float) -> None:
    """Map uniform draws from [0, 1), float32, to normal ones by the inverse of the normal distribution function, in
    place.

    The draws are k / 2**24 for integer k. 2 k / 2**24 - 1 would begin at -1, where the inverse is -inf, and its mean
    would be below 0. The midpoints (2 k + 1) / 2**24 - 1 are exact in float32, symmetric, and exclude -1 and 1. So a
    distribution that is not truncated ends at 5.4 standard deviations.
    """
    share = math.erf(bound / (std * math.sqrt(2)))  # fraction of the distribution within the bound
    uniform.mul_(2 * share).sub_(_CENTRE * share).erfinv_().mul_(std * math.sqrt(2)).clamp_(-bound, bound)


def _blocks(shape: tuple[int, ...], held: _Held) -> Iterator[_Block]:
    """The blocks of a parameter that overlap this rank's part. A row of more than 2**18 elements is one block."""
    if held.tensor.numel() == 0:
        return
    rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    first, last = held.offset[0], held.offset[0] + held.tensor.shape[0] - 1
    for index in range(first // rows, last // rows + 1):
        yield _Block(index, index * rows, min((index + 1) * rows, shape[0]))


def _held(parameter: Tensor) -> _Held:
    """This rank's part of a parameter, which is one box of the whole.

    This also holds for FSDP over tensor parallelism (`_StridedShard`), because FSDP shards the contiguous part of a tp
    rank.
    """
    if not isinstance(parameter, DTensor):
        return _Held(parameter.detach(), (0,) * parameter.dim())
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local().detach()
    if tuple(local.shape) != tuple(shape):
        raise RuntimeError(f"a shard has shape {tuple(local.shape)}, expected {tuple(shape)}: {parameter.placements}")
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
