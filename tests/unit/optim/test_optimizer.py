"""Which parameters decay, and that each way of computing the update gives the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.config.schema import Optimizer
from quadriga.optim import optimizer as made
from quadriga.optim.optimizer import build_optimizer, clip_gradients, skip_update_if


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def update(section: Optimizer, steps: int = 3) -> list[torch.Tensor]:
    model = small_model()
    optimizer = build_optimizer(model.named_parameters(), section)
    for step in range(steps):
        model(torch.arange(7)).pow(2 + step).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_every_parameter_decays_unless_configured_otherwise() -> None:
    """As in torchtitan v0.2.2, which hands all parameters to the optimizer in one group."""
    groups = build_optimizer(small_model().named_parameters(), Optimizer(weight_decay=0.1)).param_groups
    assert [len(group["params"]) for group in groups] == [2, 3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


def test_vectors_do_not_decay_where_configured_not_to_and_the_groups_stay() -> None:
    section = Optimizer(weight_decay=0.1, decay_norms_and_biases=False)
    matrices, vectors = build_optimizer(small_model().named_parameters(), section).param_groups
    assert [parameter.dim() for parameter in matrices["params"]] == [2, 2]
    assert [parameter.dim() for parameter in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_two_groups_update_as_one_does(name: str, implementation: str) -> None:
    """The bits of torch's optimizer over all parameters in one group: what torchtitan v0.2.2 builds."""
    section = Optimizer(name=name, lr=0.01, implementation=implementation)  # type: ignore[arg-type]
    model = small_model()
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    flags = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
    optimizer = kind(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **flags)
    for step in range(3):
        model(torch.arange(7)).pow(2 + step).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(update(section), model.parameters(), strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    groups = build_optimizer(model.named_parameters(), Optimizer()).param_groups
    assert sum(len(group["params"]) for group in groups) == 4


def test_every_constant_arrives() -> None:
    section = Optimizer(name="Adam", lr=0.02, beta1=0.8, beta2=0.7, eps=1e-5, implementation="foreach")
    optimizer = build_optimizer(small_model().named_parameters(), section)
    assert type(optimizer) is torch.optim.Adam
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.7), 1e-5)
    assert (group["foreach"], group["fused"]) == (True, False)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_all_implementations_agree(name: str) -> None:
    plain, *others = [
        update(Optimizer(name=name, lr=0.01, implementation=implementation))  # type: ignore[arg-type]
        for implementation in ("for-loop", "foreach", "fused")
    ]
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)


def test_adamw_takes_the_decay_from_the_weight_and_adam_from_the_gradient() -> None:
    """One step from weight 1 with gradient 0: AdamW shrinks by lr * decay; Adam's decay is scaled to a full step."""
    weight = {name: torch.nn.Parameter(torch.ones(1, 1)) for name in ("Adam", "AdamW")}
    for name, parameter in weight.items():
        section = Optimizer(name=name, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
        optimizer = build_optimizer([("weight", parameter)], section)
        parameter.grad = torch.zeros(1, 1)
        optimizer.step()
    assert weight["AdamW"].item() == pytest.approx(0.95)
    assert weight["Adam"].item() == pytest.approx(0.9)


def clipped_step(implementation: str, max_norm: float, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient before the step, and the weight after it."""
    parameter = nn.Parameter(torch.ones(3))
    built = build_optimizer([("weight", parameter)], Optimizer(lr=0.1, eps=0.1, implementation=implementation))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    clip_gradients(built, [parameter.grad], torch.tensor(norm), max_norm)
    before = parameter.grad.clone()
    built.step()
    return before, parameter.detach()


@pytest.mark.parametrize(("max_norm", "norm"), [(1.0, 5.0), (10.0, 5.0), (0.0, 5.0)])
def test_a_fused_step_on_cuda_clips_while_it_reads(
    max_norm: float, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's fused kernel takes the same argument; only its choice is made as on CUDA."""
    scaled, expected = clipped_step("fused", max_norm, norm)
    assert torch.equal(scaled, torch.tensor([3.0, 0.0, 4.0])) == (max_norm != 1.0)
    monkeypatch.setattr(made, "on_cuda", lambda gradient: True)
    unscaled, weight = clipped_step("fused", max_norm, norm)
    assert torch.equal(unscaled, torch.tensor([3.0, 0.0, 4.0]))
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    for implementation in ("foreach", "for-loop"):
        assert torch.equal(clipped_step(implementation, max_norm, norm)[0], scaled)


def test_a_step_without_a_limit_forgets_the_factor_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "on_cuda", lambda gradient: True)
    parameter = nn.Parameter(torch.ones(3))
    built = build_optimizer([("weight", parameter)], Optimizer())
    clip_gradients(built, [torch.ones(3)], torch.tensor(5.0), 1.0)
    assert built.grad_scale.item() == pytest.approx(5.0, rel=1e-5)
    clip_gradients(built, [torch.ones(3)], torch.tensor(5.0), 0.0)
    assert built.grad_scale is None


class CopiesToTheHost(TorchDispatchMode):
    """Whether each copy of a tensor of a GPU to the host lets the host go on (`non_blocking`)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and args[0].is_cuda and result.device.type == "cpu":
            self.found.append(bool((kwargs or {}).get("non_blocking")))
        return result


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_an_update_on_the_host_waits_for_the_verdict_of_the_device(state_dtype: str | None) -> None:
    """CPU offload: Adam reads the verdict at once, and a copy that has not arrived would drop good updates."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(4, 4))
        weight.grad = torch.empty(4, 4)
        optimizer = build_optimizer([("weight", weight)], Optimizer(state_dtype=state_dtype))  # type: ignore[arg-type]
        bad = torch.empty((), dtype=torch.bool, device="cuda")
        with CopiesToTheHost() as copies:
            skip_update_if(bad, optimizer, on_device=True)
            optimizer.step()
    assert copies.found == [False]
