"""Builds one record at each logging step from the numbers of the steps, with one device sync.

The fields of a record:

- `loss`, `grad_norm`, `lr`: of the logged step itself. `max_loss`: the largest of the ranks' own mean losses.
- `skipped_steps`: number of bad steps of the run so far, which did not change the weights (see `[health]`).
- `bad_records`: number of unreadable records of the data that were skipped so far.
- Every other figure covers the steps since the record before.
- `step_seconds`: elapsed time per step, without the time in `paused()` (saving, validating).
- `tokens_per_second`: tokens of the whole run per second; `tokens_per_second_per_device`: divided by the devices.
- `tflops` = flops_per_token x tokens_per_second_per_device / 1e12. Only the model's own operations count:
  recomputation and the input embedding do not count, and attention counts with its causal half.
- `mfu` = flops_per_token x tokens_per_second_per_device / peak, a share of 1; None if the peak is unknown.
- `mfu_bfloat16`: the same with the peak in bfloat16, in a run that computes in float32 at `highest`; None in others.
- `data_wait`: seconds that this rank waited for data in these steps; `data_wait_share`: divided by their elapsed time.
- `memory_*`: of this rank's device, peaks since the record before; on a CPU of the process (`memory_reader`).
- `source_tokens`, `source_epochs`: of a mixture, by the name of each source, since the run began.
- `keys_per_token`: with `training.document_mask`, `packing = "pad"` or prompts, the pairs of a query and a key that
  attention sees, divided by the tokens. `tflops` and `mfu` count this attention. `attention_imbalance`: the pairs of
  the rank with the most of them in the logged step, divided by the mean of the ranks.
- `row_fill`: with `training.packing = "pad"`, the share of the rows that is not filled up.
- `set`: of a validation, the name of the held-out set; absent if the run has one without a name.
- `eta_seconds`: remaining steps x mean elapsed time per step since the first record, including pauses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from quadriga.config.schema import Metrics
from quadriga.metrics.jsonl import Record
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.units import GIB

PROCESS = Path("/proc/self/status")


class Meter:
    """One rank's clock. Create it right before the loop, because earlier time counts as part of the first step."""

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
        bfloat16_peak: float | None = None,
        flops_of_documents: tuple[float, float] | None = None,
        row_tokens: int | None = None,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`steps`: the last step of the run; `first_step`: the first one of this attempt (1, or the one after the
        checkpoint); `tokens_seen`: of the whole run before that step; `devices`: ranks of the run; `peak_flops`: of
        one device in FLOP/s for the compute dtype, None if unknown; `bfloat16_peak`: that for `mfu_bfloat16`;
        `flops_of_documents`: for steps with documents, per token without attention, and per pair of a query and a key
        that attention sees; `row_tokens`: of the full rows of a step, if rows are filled up."""
        self._log_freq, self._steps = section.log_freq, steps
        self._attempt, self._devices = attempt, devices
        self._flops_per_token, self._peak_flops, self._bfloat16_peak = flops_per_token, peak_flops, bfloat16_peak
        self._flops_of_documents, self._row_tokens = flops_of_documents, row_tokens
        self._window_pairs: torch.Tensor | None = None  # that attention saw in these steps, with documents
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
        """Call after every step. Returns the record at a logging step (this waits for the device), else None."""
        self._window_wait += metrics.data_wait
        if metrics.attention is not None:
            before, (pairs, _) = self._window_pairs, metrics.attention
            self._window_pairs = pairs if before is None else before + pairs
        if not self.is_logging_step(metrics.step):
            return None
        bad_records = torch.zeros_like(metrics.loss) if metrics.bad_records is None else metrics.bad_records
        scalars = (metrics.loss, metrics.max_loss, metrics.grad_norm, metrics.skipped, bad_records)
        loss, max_loss, grad_norm, skipped, bad = torch.stack([scalar.detach().double() for scalar in scalars]).tolist()
        now = self._clock()
        wall = now - self._window_start
        working = max(wall - self._window_pause, 1e-9)
        count = max(metrics.step - self._window_step, 1)
        tokens = metrics.tokens_seen - self._window_tokens
        rate = tokens / working
        documents = self._of_documents(metrics, tokens)
        flops = self._flops_of(documents) * rate / self._devices
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
            "mfu_bfloat16": flops / self._bfloat16_peak if self._bfloat16_peak else None,
            "data_wait": self._window_wait,
            "data_wait_share": self._window_wait / working,
            **self._memory(),
            "eta_seconds": self._remaining(metrics.step, now, wall / count),
            **_of_sources(metrics.sources or {}),
            **documents,
            **({} if self._row_tokens is None else {"row_fill": tokens / (count * self._row_tokens)}),
        }
        self._window_start, self._window_step, self._window_tokens = now, metrics.step, metrics.tokens_seen
        self._window_wait = self._window_pause = 0.0
        self._window_pairs = None
        return record

    def _of_documents(self, metrics: StepMetrics, tokens: int) -> Record:
        """The attention of these steps, with documents."""
        if metrics.attention is None or self._window_pairs is None:
            return {}
        pairs, imbalance = torch.stack((self._window_pairs, metrics.attention[1])).tolist()
        return {"keys_per_token": pairs / max(tokens, 1), "attention_imbalance": imbalance}

    def _flops_of(self, documents: Record) -> float:
        """FLOPs per token."""
        if not documents or self._flops_of_documents is None:
            return self._flops_per_token
        plain, per_pair = self._flops_of_documents
        return plain + per_pair * float(documents["keys_per_token"])

    def validation(self, step: int, loss: float, tokens: int, seconds: float, label: str | None = None) -> Record:
        """The record of one validation: `loss` in nats per token over `tokens` tokens of the whole run. `label`: the
        name of the set, if it has one."""
        return {
            "kind": "validation",
            **({} if label is None else {"set": label}),
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
        """A context whose time does not count as training: not in the step time, nor in the figures based on it."""
        start = self._clock()
        try:
            yield
        finally:
            self._window_pause += self._clock() - start

    def _remaining(self, step: int, now: float, this_window: float) -> float:
        """The remaining time. Steps up to the first record do not count in the mean, because they include warm-up."""
        if self._first_record is None:
            self._first_record = (step, now)
            per_step = this_window
        else:
            first_step, first_time = self._first_record
            per_step = (now - first_time) / max(step - first_step, 1)
        return per_step * max(self._steps - step, 0)


def _of_sources(sources: Mapping[str, Mapping[str, float]]) -> Record:
    """The counts of each source by its name. Readers of records refuse deeper values."""
    counts = ("tokens", "epochs") if sources else ()
    return {f"source_{count}": {name: own[count] for name, own in sources.items()} for count in counts}


def memory_reader(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that reads this rank's memory: in GiB, in percent of the total, and counts."""
    return (lambda: _cuda_memory(device)) if device.type == "cuda" else _process_memory


def _cuda_memory(device: torch.device) -> dict[str, float]:
    """Peaks of the allocator since the last call. Active: used by tensors; reserved: allocated from the device."""
    stats = torch.cuda.memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    active, reserved = stats.get("active_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory_active_gib": active / GIB,
        "memory_active_percent": 100 * active / total,
        "memory_reserved_gib": reserved / GIB,
        "memory_reserved_percent": 100 * reserved / total,
        "memory_alloc_retries": stats.get("num_alloc_retries", 0),
        "memory_ooms": stats.get("num_ooms", 0),
    }


def _process_memory() -> dict[str, float]:
    """The resident set of this process now, and its peak. Empty if the system does not report them."""
    if not PROCESS.exists():
        return {}
    lines = dict(line.split(":", 1) for line in PROCESS.read_text().splitlines() if line.startswith("Vm"))
    if "VmRSS" not in lines or "VmHWM" not in lines:
        return {}
    resident, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "memory_resident_gib": resident / GIB,
        "memory_peak_gib": peak / GIB,
        "memory_peak_percent": 100 * peak / total,
    }
