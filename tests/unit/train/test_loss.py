"""The cross-entropy of a CPU against torch's, and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.data.loader import IGNORE
from quadriga.train.loss import summed_cross_entropy

ROWS, SEQ_LEN, VOCABULARY = 3, 40, 1000


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(ROWS, SEQ_LEN, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, SEQ_LEN), generator=generator)
    labels[1, 7:11] = IGNORE
    return logits.to(dtype).requires_grad_(), labels


def of_torch(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss / 117.0, logits)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    assert torch.equal(summed_cross_entropy(logits, labels), of_torch(logits.float(), labels))


def test_the_gradient_is_as_near_to_float64_as_torchs() -> None:
    logits, labels = batch()
    exact = gradient(of_torch(wide := logits.detach().double().requires_grad_(), labels), wide)
    ours, torchs = gradient(summed_cross_entropy(logits, labels), logits), gradient(of_torch(logits, labels), logits)
    error, allowed = (ours - exact).norm(), (torchs - exact).norm()
    assert error <= 1.05 * allowed
    assert error <= 1e-6 * exact.norm()
    assert not ours[1, 7:11].any(), "labels that are not counted have no gradient"


def test_the_backward_pass_may_run_again() -> None:
    """A pipeline schedule may do so."""
    logits, labels = batch()
    loss = summed_cross_entropy(logits, labels)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
