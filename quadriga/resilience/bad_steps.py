"""What is said and done about a bad step: named by step, rank and parameter, its documents written down; then the run
goes on without it, or ends (`[health]`).

On a CPU the host knows at once. With CUDA it learns at the logging step, with the numbers that the meter waits for
anyway, and before a save. All ranks learn of the same steps at the same time, so they may talk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quadriga.checkpoint.states import strip_wrappers
from quadriga.comm import collectives
from quadriga.errors import EXIT_NOT_FINITE, Fault
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.metrics.documents import format_documents
from quadriga.metrics.events import EventLog, append_line
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience.health import FINE, NOT_FINITE, HealthMonitor, StepVerdict
from quadriga.units import format_some

BAD_BATCHES_NAME = "bad_batches.jsonl"
MAX_SKIPPED_IN_A_ROW = 100  # bad steps that are skipped; a run in which nothing else happens is not training
MAX_RANKS_NAMED = 8


class CommonFault(Fault):
    """Raised by all ranks alike, at the same step: to be logged once."""


class BadSteps:
    """Looks at the verdicts of `HealthMonitor`, and does what its section says."""

    def __init__(
        self,
        health: HealthMonitor,
        parts: Sequence[torch.nn.Module],
        events: EventLog,
        folder: str,
        first_row: int | None,
    ) -> None:
        """`folder` is that of the run; `first_row`: which row of the global batch is this rank's first, None where
        another rank that reads the same rows writes them down. To be made when the state is as it will train on."""
        self._health, self._events = health, events
        self._path = Path(folder, BAD_BATCHES_NAME)
        self._first_row = first_row
        self._names = [strip_wrappers(name) for part in parts for name, p in part.named_parameters() if p.requires_grad]
        self._pending: list[StepMetrics] = []
        self._skipped = int(health.skipped)  # that have been acted on
        self._in_a_row = 0

    def check(self, metrics: StepMetrics, skipped: int | None) -> None:
        """Call after every step. `skipped`: what the step's record says of `metrics.skipped`; None without a record.

        Raises CommonFault on all ranks where `[health]` says so.
        """
        self._pending.append(metrics)
        if skipped == self._skipped:
            self._pending, self._in_a_row = [], 0
        elif skipped is not None or self._health.waits:
            self.check_pending()

    def check_pending(self) -> None:
        """Look at all steps that are pending, waiting for the device. Call before a save, too. Raises as `check`."""
        pending, self._pending = self._pending, []
        verdicts = torch.stack([metrics.verdict for metrics in pending]).tolist() if pending else []
        for metrics, figures in zip(pending, verdicts, strict=True):
            verdict = StepVerdict(*figures)
            if verdict.kind == FINE:
                self._in_a_row = 0
            else:
                self._handle(metrics, verdict)

    def _handle(self, metrics: StepMetrics, verdict: StepVerdict) -> None:
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        self._write_documents(metrics, verdict)
        what = _describe(metrics, verdict, all_gather_json(self._local_figures(verdict)))
        stops = getattr(self._health.section, _key(verdict)) == "raise"
        if stops or self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise CommonFault(f"{what}\n{self._advice(metrics, verdict, stops)}", EXIT_NOT_FINITE)
        if collectives.rank() == 0:
            logger.warning("%s\nskipped: the weights are left as they were (%d so far)", what, self._skipped)
            facts = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}
            self._events.log_event("skip", metrics.step, reason=_key(verdict), **facts)

    def _local_figures(self, verdict: StepVerdict) -> list[bool | str | None]:
        """Whether this rank's part of the loss is no finite number, and its first parameter whose gradient is none."""
        index = int(verdict.first_gradient)
        return [not math.isfinite(verdict.local_loss), self._names[index] if index >= 0 else None]

    def _write_documents(self, metrics: StepMetrics, verdict: StepVerdict) -> None:
        if self._first_row is None:
            return
        line: dict[str, Any] = {"step": metrics.step, "attempt": self._events.attempt, "rank": self._events.rank}
        rows = format_documents(metrics.documents, self._first_row)
        append_line(self._path, {**line, "reason": _key(verdict), "rows": rows})

    def _advice(self, metrics: StepMetrics, verdict: StepVerdict, stops: bool) -> str:
        safe = f"the weights are those before this step, saves are not touched; what it read is named in {self._path}"
        if not stops:
            return f"{safe}\n{self._in_a_row} steps in a row were skipped: this run does not train any more"
        return (
            f"{safe}\nto do: start again, which goes on from the newest save and reads the same batches. If step "
            f"{metrics.step} is bad again, leave it out: --health.{_key(verdict)} skip_step. If it is not, have the "
            "device of the named rank checked. If later steps follow, lower optimizer.lr"
        )


def _key(verdict: StepVerdict) -> str:
    return "non_finite" if verdict.kind == NOT_FINITE else "spike"


def _describe(metrics: StepMetrics, verdict: StepVerdict, by_rank: list[Any]) -> str:
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    line = f"step {metrics.step}: the loss is {loss:.4f}, the gradient norm {norm:.4f}"
    if verdict.kind != NOT_FINITE:
        above = (loss - verdict.mean) / verdict.deviation if verdict.deviation else math.inf
        return f"{line}; the losses before are {verdict.mean:.4f} in the mean, {above:.1f} standard deviations below"
    losses = [rank for rank, (bad, _) in enumerate(by_rank) if bad]
    # Of gradients that were added up over ranks: one rank's own bad ones are bad on all that hold them by now.
    gradients = {rank: name for rank, (_, name) in enumerate(by_rank) if name is not None}
    if losses:
        line += f"\nnot finite: the loss of {_format_ranks(losses)}"
    if gradients:
        first, name = next(iter(gradients.items()))
        line += (
            f"\nnot finite: the gradients held by {_format_ranks(list(gradients))}; on rank {first} the first is {name}"
        )
    return line


def _format_ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + format_some([str(rank) for rank in ranks], MAX_RANKS_NAMED)
