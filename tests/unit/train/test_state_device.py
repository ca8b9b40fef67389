"""The device that a rank computes on reaches the random generators of its checkpoints and the memory of batches."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from estimating import run_of

from quadriga.config.schema import Fetching
from quadriga.data.loader import Loader
from quadriga.train.build import build_state
from quadriga.train.data import dataloader_on
from quadriga.train.resume import saved_tensors


def test_the_generators_of_a_checkpoint_are_those_of_the_device() -> None:
    for name in ("cpu", "cuda:1"):
        state = build_state(run_of(ranks=1), (torch.nn.Linear(2, 2),), cast(Loader, None), torch.device(name))
        assert state.device == torch.device(name)
        assert saved_tensors(state)["random"]._device == torch.device(name)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "wanted", "pinned"),
    [("cuda", None, True), ("cuda", False, False), ("cuda", True, True), ("cpu", None, False), ("cpu", True, False)],
)
def test_batches_are_page_locked_on_cuda_unless_configured_otherwise(
    device: str, wanted: bool | None, pinned: bool
) -> None:
    assert dataloader_on(torch.device(device), Fetching(pin_memory=wanted)).pin_memory is pinned
