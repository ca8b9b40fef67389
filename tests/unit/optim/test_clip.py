"""The global norm of plain gradients, and clipping. Gradients that are cut: tests/distributed/test_parallel_clip.py."""

from __future__ import annotations

import math

import pytest
import torch
from clipping import clip_gradients, global_norm
from hypothesis import given
from hypothesis import strategies as st

from quadriga.optim.clip import gradient_norms


def parameters_with(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_a_norm_by_hand_and_its_dtype() -> None:
    norm = global_norm([torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])])
    assert norm.item() == 5.0
    assert (norm.dtype, norm.shape) == (torch.float32, ())


def test_clipping_scales_to_the_limit_and_returns_the_norm_before() -> None:
    parameters = parameters_with(torch.tensor([[3.0, 0.0]]), torch.tensor([4.0]))
    assert clip_gradients(parameters, 1.0).item() == 5.0
    assert global_norm([parameter.grad for parameter in parameters]).item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [0.0, 10.0])
def test_no_limit_or_a_wide_one_leaves_gradients_as_they_are(limit: float) -> None:
    gradients = [torch.randn(5, 3), torch.randn(7)]
    parameters = parameters_with(*gradients)
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert clip_gradients(parameters, limit).item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, gradients, strict=True))


def test_parameters_without_a_gradient_do_not_count() -> None:
    idle = torch.nn.Parameter(torch.ones(3))
    assert clip_gradients([idle, *parameters_with(torch.tensor([2.0]))], 1.0).item() == 2.0
    assert clip_gradients([idle], 1.0).item() == 0.0


def test_the_norm_does_not_depend_on_how_the_gradient_is_cut() -> None:
    """A million float32 numbers: summed in float32 the two norms differ in the sixth digit."""
    gradient = torch.randn(4_000, 250) * 1e-3
    exact = math.sqrt(gradient.double().square().sum().item())
    whole, parts = global_norm([gradient]), global_norm(gradient.split(33))
    assert torch.equal(whole, parts)
    assert whole.item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("shape", [(3000, 700), (2, 3, 5), (1, 2_000_000), (0, 4), (4, 0)])
def test_rows_in_bfloat16_have_the_norms_of_their_float32_copies(shape: tuple[int, ...]) -> None:
    """They are converted block by block; the first shape is two blocks, the third a row that is longer than one."""
    gradient = torch.randn(shape, dtype=torch.bfloat16)
    assert torch.equal(gradient_norms([gradient]).local[0], gradient_norms([gradient.float()]).local[0])


def test_what_is_not_finite_shows_in_the_norm() -> None:
    assert math.isinf(global_norm([torch.tensor([1.0, float("inf")])]).item())
    assert math.isnan(global_norm([torch.tensor([1.0, float("nan")])]).item())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.01, 100))
def test_the_clipped_norm_never_exceeds_the_limit(sizes: list[int], limit: float) -> None:
    parameters = parameters_with(*(torch.randn(size) for size in sizes))
    clip_gradients(parameters, limit)
    assert global_norm([parameter.grad for parameter in parameters]).item() <= limit * (1 + 1e-6)


def test_half_precision_gradients() -> None:
    parameters = parameters_with(torch.full((300,), 2.0, dtype=torch.bfloat16))
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(2 * math.sqrt(300), rel=1e-6)
    assert parameters[0].grad.dtype == torch.bfloat16
