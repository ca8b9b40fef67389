"""On a CUDA device a bad step is judged and left out while the host goes on."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from quadriga.config.schema import Health as HealthSection
from quadriga.optim.clip import gradient_norms, scale_gradients
from quadriga.optim.moments import AdamWithMomentsIn
from quadriga.resilience.health import NOT_FINITE, HealthMonitor, StepVerdict

NARROW = torch.bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step(parameters, optimizer, health: HealthMonitor, bad: bool) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, torch.nan if bad and number > 0 else 0.5)
    gradients = [parameter.grad for parameter in parameters]
    norms = gradient_norms(gradients)
    loss = torch.full((), 2.0, dtype=torch.float64, device="cuda")
    scale_gradients(gradients, norms.total, 1.0)
    health.skip_if_bad(optimizer, loss, norms, loss, finite=norms.total.isfinite())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("algorithm", [torch.optim.Adam, torch.optim.AdamW, partial(AdamWithMomentsIn, dtype=NARROW)])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_bad_step_is_left_out(algorithm, implementation):
    device = torch.device("cuda")
    parameters = [torch.nn.Parameter(torch.ones(8, 4, device=device)) for _ in range(3)]
    optimizer = algorithm(parameters, lr=0.1, **{implementation: True})
    health = HealthMonitor(HealthSection(non_finite="skip_step", spike="skip_step", spike_window=4), device)
    step(parameters, optimizer, health, bad=False)
    moved = [parameter.detach().clone() for parameter in parameters]
    torch.cuda.set_sync_debug_mode("error" if implementation == "fused" else "default")
    try:
        step(parameters, optimizer, health, bad=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(parameter, before) for parameter, before in zip(parameters, moved, strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    found = StepVerdict(*health.verdict.tolist())
    assert (found.kind, found.first_gradient) == (NOT_FINITE, 1)
    step(parameters, optimizer, health, bad=False)
    assert not any(torch.equal(parameter, before) for parameter, before in zip(parameters, moved, strict=True))
    assert int(health.skipped) == 1
