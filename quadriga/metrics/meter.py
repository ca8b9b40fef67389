"""Turns the numbers of each step into one record at each logging step, with one device sync.

What a record says, and how:

- `loss`, `grad_norm`, `lr`: of the logged step itself. `max_loss`: of the ranks' own mean losses the greatest.
- `skipped_steps`: how many steps of the run were bad and left the weights alone (see `[health]`).
- `bad_records`: how many records of the data could not be read and were left out so far.
- Every other figure covers the steps since the record before.
- `step_seconds`: wall time per step, without the time spent in `paused()` (saving, validating).
- `tokens_per_second`: tokens of the whole run per second; `tokens_per_second_per_device` is that over the devices.
- `tflops` = flops_per_token x tokens_per_second_per_device / 1e12, the model's own arithmetic: recomputation is not
  counted, attention is counted with its causal half, the input embedding is left out.
- `mfu` = flops_per_token x tokens_per_second_per_device / peak, a share of 1; None where the peak is not known.
- `data_wait`: seconds that this rank waited for data in these steps, `data_wait_share` that over their wall time.
- `memory_*`: of this rank's device, peaks since the record before; on a CPU the process (see `memory.py`).
- `eta_seconds`: remaining steps x mean wall time per step since the first record, pauses included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quadriga.config.schema import Metrics
from quadriga.metrics.memory import memory_reader
from quadriga.metrics.step_metrics import StepMetrics

Record = dict[str, Any]  # JSON-able: Python numbers, strings and None


class Meter:
    """One rank's clock. The time before the first step counts into that step: make it right before the loop."""

    def __init__(
        self,
        section: Metrics,
        *,
        steps: int,
        first_step: int,
        tokens_seen: int,
        attempt: int,
        devices: int,
        flops_per_token: float,
        peak_flops: float | None,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`steps`: the last step of the run; `first_step`: the one this attempt starts with (1, or the one after the
        checkpoint); `tokens_seen`: of the whole run before that step; `devices`: ranks of the run; `peak_flops`: of
        one device in FLOP/s at the computing dtype, None where it is not known."""
        self._log_freq, self._steps = section.log_freq, steps
        self._attempt, self._devices = attempt, devices
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._memory = memory_reader(device)
        self._clock = clock
        self._start = self._window_start = clock()
        self._window_step, self._window_tokens = first_step - 1, tokens_seen
        self._window_wait = self._window_pause = 0.0
        self._first_record: tuple[int, float] | None = None  # step and time

    def is_logging_step(self, step: int) -> bool:
        """Step 1, every `metrics.log_freq` steps, and the last."""
        return step == 1 or step % self._log_freq == 0 or step == self._steps

    def record(self, metrics: StepMetrics) -> Record | None:
        """Call after every step. The record at a logging step (this waits for the device), None at any other."""
        self._window_wait += metrics.data_wait
        if not self.is_logging_step(metrics.step):
            return None
        bad_records = torch.zeros_like(metrics.loss) if metrics.bad_records is None else metrics.bad_records
        scalars = (metrics.loss, metrics.max_loss, metrics.grad_norm, metrics.skipped, bad_records)
        loss, max_loss, grad_norm, skipped, bad = torch.stack([scalar.detach().double() for scalar in scalars]).tolist()
        now = self._clock()
        wall = now - self._window_start
        working = max(wall - self._window_pause, 1e-9)
        count = max(metrics.step - self._window_step, 1)
        rate = (metrics.tokens_seen - self._window_tokens) / working
        flops = self._flops_per_token * rate / self._devices
        record: Record = {
            "kind": "train",
            "step": metrics.step,
            "attempt": self._attempt,
            "time": time.time(),
            "elapsed_seconds": now - self._start,
            "loss": loss,
            "max_loss": max_loss,
            "grad_norm": grad_norm,
            "skipped_steps": int(skipped),
            "bad_records": int(bad),
            "lr": metrics.lr,
            "tokens_seen": metrics.tokens_seen,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._devices,
            "step_seconds": working / count,
            "tflops": flops / 1e12,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "data_wait": self._window_wait,
            "data_wait_share": self._window_wait / working,
            **self._memory(),
            "eta_seconds": self._remaining(metrics.step, now, wall / count),
        }
        self._window_start, self._window_step, self._window_tokens = now, metrics.step, metrics.tokens_seen
        self._window_wait = self._window_pause = 0.0
        return record

    def validation(self, step: int, loss: float, tokens: int, seconds: float) -> Record:
        """The record of one validation: `loss` in nats per token over `tokens` tokens of the whole run."""
        return {
            "kind": "validation",
            "step": step,
            "attempt": self._attempt,
            "time": time.time(),
            "elapsed_seconds": self._clock() - self._start,
            "loss": loss,
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": seconds,
            **self._memory(),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training: it is left out of the step time and of everything made from it."""
        start = self._clock()
        try:
            yield
        finally:
            self._window_pause += self._clock() - start

    def _remaining(self, step: int, now: float, this_window: float) -> float:
        """The first record is left out of the mean, for its steps hold the warm-up."""
        if self._first_record is None:
            self._first_record = (step, now)
            per_step = this_window
        else:
            first_step, first_time = self._first_record
            per_step = (now - first_time) / max(step - first_step, 1)
        return per_step * max(self._steps - step, 0)
