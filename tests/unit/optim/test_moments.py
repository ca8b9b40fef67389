"""Moments in a format of their own: the training of float32 moments within their rounding, and half the bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from quadriga.config.schema import Optimizer
from quadriga.optim import moments
from quadriga.optim.optimizer import build_optimizer, skip_update_if

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
NARROW = torch.bfloat16


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 64)).to(dtype)


def backward(model: nn.Module, step: int) -> float:
    """Learn to say the square of what was said, a batch at a time."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (32,), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens.square() % 64)
    loss.backward()
    return float(loss.detach())


def train(
    steps: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    model = small_model(dtype)
    optimizer = build_optimizer(model.named_parameters(), Optimizer(lr=1e-2, **changes))
    losses = []
    for step in range(steps):
        losses.append(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, losses


def held(optimizer: torch.optim.Optimizer, key: str = "exp_avg") -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state.values()]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fifty_steps_stay_near_those_with_float32_moments(name: str, implementation: str) -> None:
    """Losses within 0.1 % of the first one, weights within 1 % of how far they went."""
    exact, _, expected = train(50, name=name, implementation=implementation)
    model, optimizer, losses = train(50, name=name, implementation=implementation, state_dtype="bfloat16")
    assert expected[-1] < 0.6 * expected[0]
    assert losses == pytest.approx(expected, abs=1e-3 * expected[0])
    way = (weights(exact) - weights(small_model())).norm()
    assert 0 < (weights(model) - weights(exact)).norm() <= 0.01 * way
    assert {state.dtype for key in ("exp_avg", "exp_avg_sq") for state in held(optimizer, key)} == {NARROW}
    assert {float(step) for step in held(optimizer, "step")} == {50}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_moments_of_float32_parameters_are_torchs_own(implementation: str) -> None:
    ours, theirs = (train(3, implementation=implementation, state_dtype=dtype)[0] for dtype in ("float32", None))
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_in_bfloat16(implementation: str, state_dtype: str) -> None:
    """One step is that of float32 copies, rounded once."""
    model, optimizer, _ = train(0, NARROW, implementation=implementation, state_dtype=state_dtype)
    exact = copy.deepcopy(model).float()
    expected = build_optimizer(exact.named_parameters(), Optimizer(lr=1e-2, implementation=implementation))
    backward(model, 0)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        theirs.grad = ours.grad.float()
    optimizer.step()
    expected.step()
    assert torch.equal(weights(model), weights(exact.to(NARROW)))
    dtype = getattr(torch, state_dtype)
    for moment, other in zip(held(optimizer, "exp_avg_sq"), held(expected, "exp_avg_sq"), strict=True):
        assert torch.equal(moment, other.to(dtype))


def test_moments_take_half_the_bytes() -> None:
    wide, narrow = (
        sum(moment.untyped_storage().nbytes() for key in ("exp_avg", "exp_avg_sq") for moment in held(optimizer, key))
        for _, optimizer, _ in (train(1), train(1, state_dtype="bfloat16"))
    )
    assert narrow * 2 == wide == 2 * 4 * weights(small_model()).numel()


def test_a_bucket_is_updated_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the float32 copies; and buckets change nothing."""
    expected = weights(train(3, state_dtype="bfloat16")[0])
    monkeypatch.setattr(moments, "UPDATE_BUCKET", 1100)
    sizes: list[list[int]] = []
    adam = moments.adam

    def noted(parameters: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append([parameter.numel() for parameter in parameters])
        adam(parameters, *args, **kwargs)

    monkeypatch.setattr(moments, "adam", noted)
    assert torch.equal(weights(train(3, state_dtype="bfloat16")[0]), expected)
    assert sizes == [[1024], [512], [2048], [32, 64]] * 3  # matrices, then vectors; one larger than a bucket


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_withheld_step_changes_no_bit(implementation: str, on_device: bool) -> None:
    model, optimizer, _ = train(2, implementation=implementation, state_dtype="bfloat16")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    stood = weights(model)
    backward(model, 7)
    skip_update_if(torch.tensor(True), optimizer, on_device=on_device)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(weights(model), stood)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][key]) for key, value in state.items())
    backward(model, 8)
    skip_update_if(torch.tensor(False), optimizer, on_device=on_device)
    optimizer.step()
    assert not torch.equal(weights(model), stood)
    assert {float(step) for step in held(optimizer, "step")} == {3}


def test_hooks_run_after_a_step() -> None:
    """Float8 computes its scales in one."""
    model, optimizer, _ = train(1, state_dtype="bfloat16")
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    backward(model, 1)
    optimizer.step()
    assert called == [1]
