"""Stochastic rounding: right on average, and the same bits on every layout and after a resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from quadriga.config.schema import Optimizer
from quadriga.optim import rounding
from quadriga.optim.optimizer import build_optimizer
from quadriga.optim.rounding import Place, place_of, random_bits, round_stochastically

NARROW = torch.bfloat16
SECTION = Optimizer(state_dtype="bfloat16", stochastic_rounding=True, lr=1e-2)
SHAPES = {"matrix": (8, 6), "vector": (4,)}


def bits_of(place: Place, step: int, element: int) -> tuple[int, int, int]:
    """The same hash in Python's integers."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    index = place.start + element // place.columns * place.stride + element % place.columns
    upper = (index >> 32) * 0x85EBCA6B + step * 0x9E3779B9 + place.other_key
    word = mixed(mixed(index % 2**32 ^ place.key % 2**32) ^ upper % 2**32)
    return word % 2**16, word >> 16, mixed(word ^ 0x27D4EB2F) % 2**16


@pytest.mark.parametrize("place", [Place(3, -7, 0, 5, 5), Place(-(2**31), 2**31 - 1, 2**33 + 11, 3, 1000)])
@pytest.mark.parametrize("step", [1, 123_456])
def test_the_bits_are_those_of_the_hash(place: Place, step: int) -> None:
    drawn = random_bits(place, step, 6, 50, torch.device("cpu"))
    assert [tuple(map(int, each)) for each in zip(*drawn, strict=True)] == [
        bits_of(place, step, element) for element in range(6, 56)
    ]


def test_the_keys_depend_on_seed_and_name() -> None:
    parameter = torch.zeros(2, 2)
    keys = {place_of(*each, parameter) for each in ((1, "a"), (2, "a"), (1, "b"), (1, "a"))}
    assert len({(place.key, place.other_key) for place in keys}) == 3


def test_each_bit_is_set_half_of_the_time_and_the_three_are_independent() -> None:
    count = 1 << 16
    drawn = torch.stack(random_bits(Place(5, 6, 0, 1, 1), 9, 0, count, torch.device("cpu")))
    ones = torch.stack([(drawn >> bit) & 1 for bit in range(16)]).double().flatten(0, 1)
    assert (ones.mean(dim=1) - 0.5).abs().max() < 5 * 0.5 / count**0.5
    assert (torch.corrcoef(ones) - torch.eye(48)).abs().max() < 5 / count**0.5
    following = torch.stack(random_bits(Place(5, 6, 0, 1, 1), 10, 0, count, torch.device("cpu")))
    both = torch.corrcoef(torch.cat((drawn, following)).double())
    assert (both - torch.eye(6)).abs().max() < 5 / count**0.5


def test_rounding_is_right_on_average_and_keeps_what_is_no_number() -> None:
    """Of a number that is a fraction f of the way from one bfloat16 number to the next, f are rounded up."""
    count = 1 << 18
    for number, below, gap in ((1.0 + 2**-9, 1.0, 2**-7), (-3.01, -3.0, -(2**-6)), (1e-30, 0.0, 0.0)):
        held = torch.empty(count, dtype=NARROW)
        exact = torch.full((count,), number)
        round_stochastically([(exact, held), (exact, exact), (exact, exact)], Place(1, 2, 0, 1, 1), 3)
        deviation = (held.double().mean() - exact.double()[0]).abs()
        spread = held.double().std() / count**0.5
        assert deviation < 5 * spread > 0
        if gap:
            assert set(held.tolist()) == {below, below + gap}
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.5])
    held = torch.empty(5, dtype=NARROW)
    round_stochastically([(odd, held), (odd, odd), (odd, odd)], Place(1, 2, 0, 1, 1), 3)
    assert held[0].isnan()
    assert torch.equal(held.float()[1:], odd[1:])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights_after(2)
    monkeypatch.setattr(rounding, "BLOCK", 7)
    assert all(torch.equal(one, other) for one, other in zip(weights_after(2), expected, strict=True))


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step)).to(NARROW)


def weights_after(
    steps: int, mesh: Any = None, placements: tuple[Placement, ...] = (), resumed: bool = False, seed: int = 1
) -> list[Tensor]:
    """Weights and moments of two bfloat16 parameters after steps with given gradients."""

    def placed(name: str, whole: Tensor) -> Tensor:
        if mesh is None:
            return whole
        kept = tuple(Replicate() if each == Shard(1) and whole.dim() == 1 else each for each in placements)
        return distribute_tensor(whole, mesh, kept)

    model = {name: nn.Parameter(placed(name, torch.ones(shape, dtype=NARROW))) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(model.items(), SECTION, seed)
    for step in range(steps):
        if resumed:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(model.items(), SECTION, seed)
            optimizer.load_state_dict(state)
        for name, parameter in model.items():
            parameter.grad = placed(name, gradient(name, step))
        optimizer.step()
    found = []
    for parameter in model.values():
        for held in (
            parameter.detach(),
            optimizer.state[parameter]["exp_avg"],
            optimizer.state[parameter]["exp_avg_sq"],
        ):
            assert held.dtype == NARROW
            found.append(held if mesh is None else held.full_tensor())
    return found


def on_two_ranks() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    return [weights_after(5, mesh, (placement,)) for placement in (Shard(0), Shard(1), Replicate())]


def test_layouts_round_alike_to_the_bit() -> None:
    """FSDP 2, TP 2 along columns, and DDP 2."""
    alone = weights_after(5)
    for layouts in run_ranks(on_two_ranks, 2):
        for found in layouts:
            assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_a_resumed_run_rounds_as_before_and_another_seed_does_not() -> None:
    alone = weights_after(4)
    assert all(torch.equal(one, other) for one, other in zip(weights_after(4, resumed=True), alone, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(weights_after(4, seed=2), alone, strict=True))


def test_a_second_moment_falls_on_average_where_rounding_to_nearest_holds_it() -> None:
    moments = {}
    for stochastic in (True, False):
        parameter = nn.Parameter(torch.ones(4096))
        section = Optimizer(beta2=0.999, state_dtype="bfloat16", stochastic_rounding=stochastic)
        optimizer = build_optimizer([("weight", parameter)], section)
        for step in range(101):
            parameter.grad = torch.full((4096,), 1.0 if step == 0 else 0.0)
            optimizer.step()
        moments[stochastic] = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    assert moments[True] == pytest.approx(0.001 * 0.999**100, rel=5e-3)
    assert moments[False] == pytest.approx(0.001, rel=2**-8)
