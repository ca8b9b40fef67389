"""What `[debug]` sets for the whole process reaches torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch._inductor.config as inductor

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.models.registry import catalogue
from quadriga.train.numerics import set_numerics


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch):
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    casts = inductor.emulate_precision_casts
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    inductor.emulate_precision_casts = casts
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_float32_matmul_precision(precision)


def numerics_of(*arguments: str) -> tuple[bool, bool, str, float]:
    argv = ["--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", *arguments]
    set_numerics(read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=False))
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.rand(()).item(),
    )


def test_deterministic_kernels_are_asked_for():
    assert numerics_of()[:2] == (False, False)
    assert numerics_of("--debug.deterministic")[:2] == (True, False)
    assert numerics_of("--debug.deterministic", "--debug.deterministic_warn_only")[:2] == (True, True)


def test_the_seed_and_the_precision_reach_torch():
    assert numerics_of("--debug.seed=3")[3] == numerics_of("--debug.seed=3")[3] != numerics_of("--debug.seed=4")[3]
    assert numerics_of("--training.float32_matmul_precision=highest")[2] == "highest"
    assert numerics_of("--training.float32_matmul_precision=medium")[2] == "medium"


def test_deterministic_products_have_their_workspace(monkeypatch):
    """torch refuses cuBLAS's products without it; one that the environment names is kept."""
    numerics_of()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    numerics_of("--debug.deterministic")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    numerics_of("--debug.deterministic")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_rowwise_scales_are_of_rounded_numbers():
    float8, recipe = "--model.converters=quantize.linear.float8", "--quantize.linear.float8.recipe_name"
    for arguments in ((), (f"{recipe}=rowwise",), (float8,), (float8, f"{recipe}=tensorwise")):
        numerics_of(*arguments)
        assert not inductor.emulate_precision_casts, arguments
    numerics_of(float8, f"{recipe}=rowwise")
    assert inductor.emulate_precision_casts
