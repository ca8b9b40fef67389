"""The betas that are refused with moments in bfloat16 are those at which moments get stuck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.errors import UserError
from quadriga.models.registry import catalogue
from quadriga.optim.moments import AdamWithMomentsIn

OCTAVE = torch.arange(128).div(128).add(1).to(torch.bfloat16)  # every bfloat16 number from 1 to below 2


def is_refused(key: str, beta: float) -> bool:
    argv = ["--model.hf_assets_path=builtin:bytes", "--optimizer.state_dtype=bfloat16", f"--optimizer.{key}={beta!r}"]
    try:
        read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=True)
    except UserError as error:
        return all(f"optimizer.{key} = " in problem.what for problem in error.problems)
    return False


def stuck(beta: float) -> int:
    """How many numbers of an octave stay what they are in a step of Adam with a gradient of 0."""
    parameter = torch.nn.Parameter(torch.zeros(128))
    parameter.grad = torch.zeros(128)
    optimizer = AdamWithMomentsIn([parameter], dtype=torch.bfloat16, betas=(0.9, beta), foreach=False)
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"].copy_(OCTAVE)
    optimizer.step()
    return int((optimizer.state[parameter]["exp_avg_sq"] == OCTAVE).sum())


@given(st.floats(0.5, 0.99999))
@example(1 - 2**-8)
@example(0.996)
@example(0.9962)
@example(0.999)
def test_what_the_check_accepts_falls_from_everywhere(beta: float) -> None:
    assert is_refused("beta2", beta) == (1 - beta < 2**-8)
    if not is_refused("beta2", beta):
        assert stuck(beta) == 0
    elif 1 - beta < 1 / 258:  # the number next to 1 is the last to fall; between the two bounds the check is strict
        assert stuck(beta) > 0
    if 1 - beta < 2**-9:
        assert stuck(beta) == 128


@pytest.mark.parametrize(("beta", "refused"), [(0.9, False), (0.996, False), (0.997, True)])
def test_the_first_moment_is_held_to_the_same(beta: float, refused: bool) -> None:
    assert is_refused("beta1", beta) == refused


def findings(*arguments: str) -> tuple[list[str], list[str]]:
    """The refusals and the notices of a start."""
    argv = ["--model.hf_assets_path=builtin:bytes", *arguments]
    try:
        run = read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=True)
    except UserError as error:
        return [str(problem) for problem in error.problems], []
    return [], list(run.spec.notices)


@pytest.mark.parametrize(("beta2", "refused"), [("0.997", False), ("0.9985", True)])
def test_moments_of_bfloat16_parameters_are_refused_where_none_falls(beta2: str, refused: bool) -> None:
    argv = ("--training.dtype=bfloat16", f"--optimizer.beta2={beta2}")
    problems, notices = findings(*argv)
    said = problems if refused else [notice for notice in notices if "beta2" in notice]
    assert len(said) == 1
    assert "optimizer.stochastic_rounding = true" in said[0]
    problems, notices = findings(*argv, "--optimizer.stochastic_rounding")
    assert problems == []
    assert not [notice for notice in notices if "beta2" in notice or "rounded away" in notice]


def test_stochastic_rounding_of_float32_has_no_effect_and_a_notice_says_so() -> None:
    noticed = [notice for notice in findings("--optimizer.stochastic_rounding")[1] if "has no effect" in notice]
    assert noticed == [
        "optimizer.stochastic_rounding has no effect: neither weights nor moments are in bfloat16",
    ]
