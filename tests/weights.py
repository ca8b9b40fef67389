"""The least that can be saved: two tensors that go by their value."""

from __future__ import annotations

import torch


class Weights:
    def __init__(self, value: float) -> None:
        self.held = {"a.weight": torch.full((40, 5), value), "b.weight": torch.arange(30.0)}

    def state_dict(self):
        return self.held

    def load_state_dict(self, loaded):
        self.held = dict(loaded)
