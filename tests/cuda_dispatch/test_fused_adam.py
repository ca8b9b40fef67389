"""The Triton kernel of Adam without a GPU: compiled for Hopper, and interpreted beside the arithmetic in torch.

Skipped where Triton is not installed. It belongs to the CUDA builds of torch; `make test-cuda-dispatch` installs one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from quadriga.config.schema import Optimizer
from quadriga.optim import adam_kernel, moments
from quadriga.optim.optimizer import build_optimizer, clip_gradients, skip_update_if

pytestmark = [
    pytest.mark.cuda_dispatch,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(("weights", "state"), list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_launch_of_a_step_compiles_for_hopper(
    name: str, weights: str, state: str, stochastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch itself, up to the device: Triton chooses types by the arguments and compiles, and nothing is run."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(kernel, *arguments, warmup=True, **options))

    hopper = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(moments, "adam_update", adam_kernel.update_all)
    model = nn.Linear(48, 64).to(getattr(torch, weights))
    section = Optimizer(name=name, state_dtype=state, stochastic_rounding=stochastic)
    optimizer = build_optimizer(model.named_parameters(), section)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1.0)
    update(optimizer)
    assert len(compiled) == 2
    for kernel in compiled:
        assert len(kernel.asm["cubin"]) > 1000
        assert ".target sm_90" in kernel.asm["ptx"]


@pytest.mark.parametrize("state_dtype", ["bfloat16", None])
def test_a_step_on_cuda_reads_nothing_on_the_host(state_dtype: str | None) -> None:
    """Of fake tensors, reading a value is an error. With None, torch's kernel clips."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(64, 32, device="cuda"))
        weight.grad = torch.empty(64, 32, device="cuda")
        section = Optimizer(state_dtype=state_dtype, stochastic_rounding=state_dtype is not None)
        optimizer = build_optimizer([("weight", weight)], section)
        clip_gradients(optimizer, [weight.grad], torch.empty((), device="cuda"), 1.0)
        skip_update_if(torch.empty((), dtype=torch.bool, device="cuda"), optimizer, on_device=True)
        optimizer.step()
        state = optimizer.state[weight]
        assert {value.device.type for value in state.values()} == {"cuda"}
        assert state["exp_avg"].dtype == (torch.bfloat16 if state_dtype else torch.float32)


INTERPRETED = """
import json, sys
import test_fused_adam
print(json.dumps(test_fused_adam.differences(*json.loads(sys.argv[1]))))
"""


CASES = [
    ("AdamW", "float32", "bfloat16", False),
    ("Adam", "bfloat16", "float32", False),
    ("AdamW", "float32", "float32", False),
    ("AdamW", "bfloat16", "bfloat16", True),
    ("Adam", "bfloat16", "bfloat16", True),
]


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_computes_what_torch_does(case: tuple[str, str, str, bool]) -> None:
    """Float32 results to 2e-5 of their size. Stochastic rounding has torch's bits: at most 1 element of 100 is another.

    The interpreter truncates where a GPU rounds to nearest, so that one update is then within the last bit.
    """
    here = Path(__file__).resolve().parent
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    command = [sys.executable, "-c", INTERPRETED, json.dumps(case)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["skipped"] == 0
    for name, (largest, others) in found["differences"].items():
        assert largest <= (2e-5 if name.endswith("float32") else 2**-7), (name, found)
        assert others <= (0.01 if case[3] and name.endswith("bfloat16") else 1.0), (name, found)


def differences(name: str, weight_dtype: str, state_dtype: str, stochastic: bool) -> dict[str, Any]:
    """The largest relative difference of weights and moments after three or one updates, and the share of others.

    The kernel runs in a process whose Triton interprets; it takes the place of the CPU's arithmetic.
    """
    section = Optimizer(name=name, lr=1e-2, state_dtype=state_dtype, stochastic_rounding=stochastic)
    torch.manual_seed(1)
    ours = nn.Linear(50, 70).to(getattr(torch, weight_dtype))
    theirs = copy.deepcopy(ours)
    kernel, reference = (build_optimizer(model.named_parameters(), section, 5) for model in (ours, theirs))
    moments.adam_update = adam_kernel.update_all  # which has no device to be dispatched to
    norm = torch.tensor(4.0)  # a quotient is exact in bfloat16 too
    for _ in range(3 if stochastic or {weight_dtype, state_dtype} == {"float32"} else 1):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape).to(one.dtype)
            other.grad = one.grad / norm
        kernel.grad_scale, kernel.found_inf = norm, torch.tensor(0.0)
        update(kernel)
        reference.step()
    before, expected = held(ours, kernel), held(theirs, reference)
    kernel.found_inf = torch.tensor(1.0)
    update(kernel)
    after = held(ours, kernel)
    return {
        "skipped": sum(int((after[key] != value).sum()) for key, value in before.items()),
        "differences": {
            f"{key} {value.dtype}": [
                ((value.double() - expected[key].double()).abs() / value.double().abs().clamp(min=1e-3)).max().item(),
                (value != expected[key]).double().mean().item(),
            ]
            for key, value in before.items()
        },
    }


def update(optimizer: Any) -> None:
    """One step of the path that CUDA takes."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            optimizer._update_in_one_kernel(group, group["params"])


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found
