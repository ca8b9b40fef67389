"""The device that a rank computes on reaches the random generators that its checkpoints hold."""

from __future__ import annotations

from typing import cast

import torch
from estimating import run_of

from quadriga.data.loader import Loader
from quadriga.train.build import build_state
from quadriga.train.resume import saved_tensors


def test_the_generators_of_a_checkpoint_are_those_of_the_device() -> None:
    for name in ("cpu", "cuda:1"):
        state = build_state(run_of(ranks=1), (torch.nn.Linear(2, 2),), cast(Loader, None), torch.device(name))
        assert state.device == torch.device(name)
        assert saved_tensors(state)["random"]._device == torch.device(name)  # type: ignore[attr-defined]
