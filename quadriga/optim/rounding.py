"""Stochastic rounding to bfloat16 (arXiv 2010.06192): up or down at random, and on average to the exact value.

The random bits of an element depend on (seed, parameter name, step, index in the whole parameter) alone. So all layouts
round alike, a resumed run rounds as the first one would have, and `adam_kernel` has the same bits on a GPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quadriga.tensors import offset_of, to_local

BLOCK = 1 << 20  # elements at a time, so that temporary tensors stay small
# 32-bit constants as signed numbers: the two factors of `mixed`, those of step and upper index, and one for more bits.
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)
STEP, UPPER, MORE = 0x9E3779B9 - 2**32, 0x85EBCA6B - 2**32, 0x27D4EB2F


@dataclass(frozen=True)
class Place:
    """The indices of a rank's shard in its parameter, and the two 32-bit keys of the parameter, as signed numbers.

    Element i of the shard is element `start + i // columns * stride + i % columns` of the parameter, both row-major.
    """

    key: int
    other_key: int
    start: int
    columns: int
    stride: int


def place_of(seed: int, name: str, parameter: Tensor) -> Place:
    """The place of this rank's shard of `parameter`, a plain tensor or a DTensor whose shards are boxes."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    key, other_key = (int.from_bytes(part, "little", signed=True) for part in (digest[:4], digest[4:]))
    columns, stride = math.prod(to_local(parameter).shape[1:]), math.prod(parameter.shape[1:])
    row, column = (*offset_of(parameter), 0, 0)[:2]
    return Place(key, other_key, row * stride + column * math.prod(parameter.shape[2:]), columns, stride)


def round_stochastically(pairs: Sequence[tuple[Tensor, Tensor]], place: Place, step: int) -> None:
    """Write float32 tensors to others of their shape. Those in bfloat16 are rounded stochastically.

    Args:
        pairs: (result, held) of the weight, the first and the second moment of one shard, in this order.
        step: the number of the update, from 1.
    """
    flat = [(result.reshape(-1).split(BLOCK), held.view(-1).split(BLOCK)) for result, held in pairs]
    for number, blocks in enumerate(zip(*(zip(*pair, strict=True) for pair in flat), strict=True)):
        count = len(blocks[0][0])
        bits = random_bits(place, step, number * BLOCK, count, blocks[0][0].device)
        for (result, held), random in zip(blocks, bits, strict=True):
            if held.dtype == torch.bfloat16:
                held.copy_(rounded(result, random))
            elif result is not held:
                held.copy_(result)


def random_bits(place: Place, step: int, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers from 0 to 65535 for `count` elements of the shard from `first` on: int32, shape (count,)."""
    element = torch.arange(first, first + count, device=device)
    index = element // place.columns * place.stride + element % place.columns + place.start
    upper = (index >> 32).to(torch.int32).mul_(UPPER).add_(_wrapped(place.other_key + step * STEP))
    word = mixed(mixed(index.to(torch.int32) ^ place.key) ^ upper)
    return word & 0xFFFF, (word >> 16) & 0xFFFF, mixed(word ^ MORE) & 0xFFFF


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which each bit of the result depends on all bits of `x` (int32, in place).

    The shifts and factors are those of "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018). int32 products
    wrap around.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= FACTORS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= FACTORS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def rounded(exact: Tensor, random: Tensor) -> Tensor:
    """`exact` (float32) as float32 numbers that bfloat16 has. `random`: int32, from 0 to 65535.

    bfloat16 is the upper half of float32. Adding a uniform number to the lower half carries into the upper half with
    the right probability. NaN and infinity are unchanged.
    """
    result = ((exact.view(torch.int32) + random) & -0x10000).view(torch.float32)
    return torch.where(exact.isfinite(), result, exact)


def _wrapped(number: int) -> int:
    """The lower 32 bits, as a signed number."""
    return (number + 2**31) % 2**32 - 2**31
