"""Reports a bad step by step, rank and parameter, and records its documents. Then the run skips it or ends.

`[health]` has the policies. On a CPU the host reads the verdict at once. With CUDA it reads it at the logging step,
together with the numbers that the meter waits for, and before a save. All ranks read the verdicts of the same steps at
the same point, so they may call collectives here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quadriga.comm import collectives
from quadriga.errors import EXIT_NOT_FINITE, Fault
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.metrics.documents import format_documents
from quadriga.metrics.events import EventLog, append_line
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience.health import FINE, NOT_FINITE, HealthMonitor, StepVerdict
from quadriga.units import format_some, strip_wrappers

BAD_BATCHES_NAME = "bad_batches.jsonl"
MAX_SKIPPED_IN_A_ROW = 100  # skipped bad steps; a run that skips more makes no progress, so it ends
MAX_RANKS_NAMED = 8


class CommonFault(Fault):
    """Raised by all ranks at the same step, so that it is logged once."""


class BadSteps:
    """Reads the verdicts of `HealthMonitor` and applies the policies of `[health]`."""

    def __init__(
        self,
        health: HealthMonitor,
        parts: Sequence[torch.nn.Module],
        events: EventLog,
        folder: str,
        first_row: int | None,
    ) -> None:
        """Create it after the state is restored, because it reads `health.skipped`.

        Args:
            folder: the run folder.
            first_row: index in the global batch of this rank's first row; None if another rank with the same rows
                records their documents.
        """
        self._health, self._events = health, events
        self._path = Path(folder, BAD_BATCHES_NAME)
        self._first_row = first_row
        self._names = [strip_wrappers(name) for part in parts for name, p in part.named_parameters() if p.requires_grad]
        self._pending: list[StepMetrics] = []
        self._skipped = int(health.skipped)  # bad steps that have been handled
        self._in_a_row = 0

    def check(self, metrics: StepMetrics, skipped: int | None) -> None:
        """Call after every step. `skipped`: the value of `metrics.skipped` in the step's record; None without a record.

        Raises:
            CommonFault: on all ranks, if the policy is `raise`, or after `MAX_SKIPPED_IN_A_ROW` bad steps in a row.
        """
        self._pending.append(metrics)
        if skipped == self._skipped:
            self._pending, self._in_a_row = [], 0
        elif skipped is not None or self._health.waits:
            self.check_pending()

    def check_pending(self) -> None:
        """Check all pending steps; this waits for the device. Call it also before a save. Raises as `check`."""
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
            logger.warning("%s\nskipped: the weights are unchanged (%d so far)", what, self._skipped)
            facts = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}
            self._events.log_event("skip", metrics.step, reason=_key(verdict), **facts)

    def _local_figures(self, verdict: StepVerdict) -> list[bool | str | None]:
        """Whether this rank's part of the loss is NaN or infinite, and its first parameter whose gradient is."""
        index = int(verdict.first_gradient)
        return [not math.isfinite(verdict.local_loss), self._names[index] if index >= 0 else None]

    def _write_documents(self, metrics: StepMetrics, verdict: StepVerdict) -> None:
        if self._first_row is None:
            return
        line: dict[str, Any] = {"step": metrics.step, "attempt": self._events.attempt, "rank": self._events.rank}
        rows = format_documents(metrics.documents, self._first_row)
        append_line(self._path, {**line, "reason": _key(verdict), "rows": rows})

    def _advice(self, metrics: StepMetrics, verdict: StepVerdict, stops: bool) -> str:
        safe = f"the weights are those before this step, checkpoints are unchanged; its documents are in {self._path}"
        if not stops:
            return f"{safe}\n{self._in_a_row} steps in a row were skipped: the run makes no progress"
        return (
            f"{safe}\nto do: start again; the run resumes from the newest checkpoint and reads the same batches. If "
            f"step {metrics.step} is bad again, skip it: --health.{_key(verdict)} skip_step. If it is not, check the "
            "device of the named rank. If later steps are bad too, lower optimizer.lr"
        )


def _key(verdict: StepVerdict) -> str:
    return "non_finite" if verdict.kind == NOT_FINITE else "spike"


def _describe(metrics: StepMetrics, verdict: StepVerdict, by_rank: list[Any]) -> str:
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    line = f"step {metrics.step}: the loss is {loss:.4f}, the gradient norm {norm:.4f}"
    if verdict.kind != NOT_FINITE:
        above = (loss - verdict.mean) / verdict.deviation if verdict.deviation else math.inf
        return f"{line}; the mean of the losses before is {verdict.mean:.4f}, {above:.1f} standard deviations below"
    losses = [rank for rank, (bad, _) in enumerate(by_rank) if bad]
    # The gradients are already reduced: a NaN of one rank is now on all ranks that hold the same shard.
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
