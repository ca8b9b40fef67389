"""The loss on text that is not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from quadriga.comm.mesh import Mesh
from quadriga.data.batch import IGNORE
from quadriga.data.loader import Loader
from quadriga.train.step import Loss


@dataclass(frozen=True)
class Validator:
    """One pass over the validation text, or its first `steps` batches, weighted by tokens.

    The loader begins its pass again each time it is iterated, so two validations see the same text.
    """

    loader: Loader
    loss: Loss
    device: torch.device
    freq: int
    steps: int  # -1: all of it

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.freq == 0

    @torch.no_grad()
    def mean_loss(self, model: torch.nn.Module, mesh: Mesh) -> tuple[float, int]:
        """The mean cross-entropy in nats per token over all ranks, and the number of tokens it is the mean of."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # (nats, tokens): read once, at the end
        model.eval()
        for batch in islice(self.loader, None if self.steps < 0 else self.steps):
            labels = batch.labels.to(self.device)
            total[0] += self.loss(model(batch.tokens.to(self.device)), labels)
            total[1] += (labels != IGNORE).sum()
        model.train()
        summed, tokens = mesh.reduce_sum(total).tolist()
        return summed / tokens, int(tokens)
