"""Initial weights as a function of (seed, parameter name, block of rows), so that all layouts start from equal weights.

A parameter is drawn in blocks of whole rows, at most 2**18 elements each. Each block has its own generator: PCG64,
seeded with a 128-bit hash of these three values. (`torch.Generator` on CPU uses only 32 bits of a seed, too few for the
1.6 million blocks of 405B.) A rank draws the blocks that overlap its shard and keeps its part. This needs memory for
one block per thread. All draws are on the CPU, also for a GPU, so a rehearsal has the initial weights of the real run.
For a GPU they fill one of two page-locked buffers while the other one is copied. Not measured on a GPU yet.
"""

from __future__ import annotations

import hashlib
import math
import os
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
from quadriga.units import MIB

BLOCK_ELEMENTS = 2**18
BUFFER_BYTES = 64 * MIB
_MIDDLE = 0.5 - 2**-25  # see `_to_normal`
_CHUNK = 2**15  # small enough for the L1 or L2 cache, and so that PyTorch does not split it over its own threads

# Coefficients of AS 241 for probabilities from 0.075 to 0.925, and for those outside.
_CENTRAL = (59.109374720, 159.29113202, 50.434271938, 3.3871327179)
_CENTRAL_DIVISOR = (67.187563600, 78.757757664, 17.895169469, 1.0)
_TAIL = (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
_TAIL_DIVISOR = (0.12021132975, 0.73700164250, 1.0)
_ARTANH = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)  # artanh(s) / s in powers of s**2


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
    host = _Host(device)
    with ThreadPoolExecutor(_threads(), "initial-weights") as pool:
        for plan in parameters:
            held = _held(named[plan.name])
            if plan.init == "ones":
                held.tensor.fill_(1.0)
                continue
            for part, blocks in _parts(plan.shape, held):
                on_host = host.next(part.tensor)
                list(pool.map(partial(_fill, _Held(on_host, part.offset), plan, seed), blocks))
                host.send(on_host, part.tensor)
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


class _Host:
    """Where values are drawn: for a GPU in two buffers in turn, else where the parameter is."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self.copied: list[torch.cuda.Event | None] = [None, None]

    def next(self, target: Tensor) -> Tensor:
        """A tensor like `target`. Waits until what it held before is copied."""
        if not self.on_gpu:
            return target
        self.buffers.reverse()
        self.copied.reverse()
        if (copied := self.copied[0]) is not None:
            copied.synchronize()
        if target.nbytes > self.buffers[0].nbytes:
            self.buffers[0] = self.allocated(max(target.nbytes, BUFFER_BYTES))
        return self.buffers[0][: target.nbytes].view(target.dtype).view(target.shape)

    def allocated(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, drawn: Tensor, target: Tensor) -> None:
        """Start the copy of the tensor that `next` returned last."""
        if self.on_gpu:
            target.copy_(drawn, non_blocking=True)
            self.copied[0] = torch.cuda.current_stream().record_event()


def _threads() -> int:
    """The threads of PyTorch, or this rank's share of the cores if that is more: torchrun leaves each rank one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(torch.get_num_threads(), cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _parts(shape: tuple[int, ...], held: _Held) -> Iterator[tuple[_Held, list[_Block]]]:
    """The rows of this rank's part in pieces of whole blocks, of about BUFFER_BYTES each, with these blocks."""
    blocks, first = list(_blocks(shape, held)), held.offset[0]
    while blocks:
        row_bytes = held.tensor[0].nbytes
        count = max(1, BUFFER_BYTES // (row_bytes * (blocks[0].stop - blocks[0].start)))
        piece, blocks = blocks[:count], blocks[count:]
        start, stop = max(piece[0].start, first), min(piece[-1].stop, first + len(held.tensor))
        yield _Held(held.tensor[start - first : stop - first], (start, *held.offset[1:])), piece


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

    The draws are k / 2**24 for integer k. They would begin at 0, where the inverse is -inf, and their mean would be
    below 1/2. The midpoints (2 k + 1) / 2**25 are symmetric and exclude 0 and 1. So a distribution that is not
    truncated ends at 5.4 standard deviations.
    """
    share = math.erf(bound / (std * math.sqrt(2)))  # fraction of the distribution within the bound
    from_middle = uniform.sub_(_MIDDLE).mul_(share)
    uniform.copy_(_inverse_normal(from_middle).mul_(std).clamp_(-bound, bound))


def _inverse_normal(from_middle: Tensor) -> Tensor:
    """The x at which the normal distribution function is 1/2 + `from_middle`; float32, relative error below 5e-7.

    Algorithm AS 241 (PPND7) of Wichura, Applied Statistics 37 (1988). It uses only operations that IEEE 754 defines
    to the bit, one at a time. The last bit of `torch.erfinv`, `torch.log` and `torch.sqrt` (MKL's) depends on the CPU,
    but a seed must give the same weights on every machine. NumPy's square root is that of IEEE 754.
    """
    r = (from_middle * from_middle).neg_().add_(0.180625)
    result = _polynomial(r, _CENTRAL).div_(_polynomial(r, _CENTRAL_DIVISOR)).mul_(from_middle)
    tails = (from_middle.abs() > 0.425).nonzero().squeeze(1)
    sides = from_middle[tails]
    r = _log(0.5 - sides.abs()).neg_()
    np.sqrt(r.numpy(), out=r.numpy())
    r.sub_(1.6)
    result[tails] = _polynomial(r, _TAIL).div_(_polynomial(r, _TAIL_DIVISOR)).copysign_(sides)
    return result


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of positive normal float32 numbers, by the series of artanh around sqrt(1/2)."""
    mantissa, exponent = torch.frexp(x)
    middle = math.sqrt(0.5)
    s = (mantissa - middle).div_(mantissa + middle)
    of_mantissa = _polynomial(s * s, _ARTANH).mul_(s).mul_(2).add_(math.log(middle))
    return exponent.to(x.dtype).mul_(math.log(2)).add_(of_mantissa)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule; the coefficient of the highest power comes first."""
    result = x.mul(coefficients[0]).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        result.mul_(x).add_(coefficient)
    return result


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
