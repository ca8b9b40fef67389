"""Validation: the loss on text that is not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from quadriga.comm.mesh import Mesh
from quadriga.data.loader import IGNORE, Loader
from quadriga.errors import Problem, UserError
from quadriga.parallel.data_parallel import free_gathered_parameters
from quadriga.train.feed import Feed
from quadriga.train.step import ForwardBackward


@dataclass(frozen=True)
class Validator:
    """One pass over the validation text, or its first `steps` batches, weighted by tokens.

    Each iteration of the loader begins a new pass, so all validations use the same text.
    """

    loader: Loader
    feed: Feed
    forward: ForwardBackward
    device: torch.device
    freq: int
    steps: int  # -1: all of it

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.freq == 0

    @torch.no_grad()
    def mean_loss(self, parts: tuple[torch.nn.Module, ...], mesh: Mesh) -> tuple[float, int]:
        """The mean cross-entropy in nats per token over all ranks, and the number of tokens in the mean.

        Raises:
            DataFault: on all ranks, if one cannot read the text; the parts are then unchanged.
            UserError: the text has no token that counts.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # (nats, tokens), read once, at the end
        for part in parts:
            part.eval()
        try:
            for batch in islice(self.feed.one_pass(self.loader), None if self.steps < 0 else self.steps):
                total[0] += self.forward.evaluate(batch)
                total[1] += (batch.labels != IGNORE).sum()
        finally:
            for part in parts:
                free_gathered_parameters(part)
                part.train()
        summed, tokens = mesh.reduce_sum(total).tolist()
        if tokens == 0:  # on all ranks
            what = "its data contain no window of validation.seq_len tokens"
            raise UserError(Problem("validation.dataset", what, fix="use more text, or reduce validation.seq_len"))
        # Ranks that share rows count all tokens of these rows each, but only the nats of their own part.
        tokens = tokens * mesh.batch_degree / mesh.loss_group.size()
        return summed / tokens, int(tokens)
