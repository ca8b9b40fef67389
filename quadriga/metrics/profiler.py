"""Traces of the PyTorch profiler and snapshots of the CUDA allocator, in cycles of `profiling.profile_freq` steps.

    with Profiler(section, folders, rank=0, device=device, first_step=1, steps=200) as profiler:
        for step in ...:
            ...
            profiler.step(step)

A cycle waits, warms up for `profiler_warmup` steps and records its last `profiler_active` steps. The trace is
`iteration_N/rankK_trace.json.gz`, where N is the last recorded step. A run shorter than one cycle has one cycle of its
own length, so that a short run also writes a trace. In a trace, `ProfilerStep#I` is step `first_step + I`. The key
`quadriga` holds `first_step`, `machine`, and the result of `notes`.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from quadriga.config.run_spec import Folders
from quadriga.config.schema import Profiling
from quadriga.log import logger
from quadriga.metrics.cycles import Cycle
from quadriga.metrics.guarded import WriteFailures

ALLOCATOR_EVENTS = 100_000
NOTES = "quadriga"  # the key of Quadriga's metadata in a trace
FAST = 3  # gzip level: traces compress nearly as well as at 9, in less time


Notes = Callable[[int], Mapping[str, Any]]  # of a trace that began at that time, in ns since the epoch


class _Profile(profile):
    """Torch's profiler, which also calls `notes` after the last recorded step and writes the result into the trace."""

    def __init__(self, notes: Notes, **arguments: Any) -> None:
        self._notes, self._since_ns = notes, 0
        super().__init__(**arguments)

    def start_trace(self) -> None:
        self._since_ns = time.time_ns()
        super().start_trace()

    def stop_trace(self) -> None:
        self.add_metadata_json(NOTES, json.dumps(self._notes(self._since_ns)))
        super().stop_trace()


class Profiler:
    """Writes the traces and snapshots of one rank that `[profiling]` requests; does nothing if it requests none."""

    def __init__(
        self,
        section: Profiling,
        folders: Folders,
        *,
        rank: int,
        device: torch.device,
        first_step: int,
        steps: int,
        notes: Notes | None = None,
        failures: WriteFailures | None = None,
    ) -> None:
        """`first_step`: the first step of this attempt; `steps`: the last one of the run. `failures` records traces
        that cannot be written.

        `notes`: called when a trace ends, for data that a reader of the trace needs and torch does not write.
        """
        self._first_step, self._notes = first_step, notes
        self._failures = failures or WriteFailures(stops=False)
        self._section, self._rank, self._device = section, rank, device
        self._folder, self._snapshots = Path(folders.traces), Path(folders.memory_snapshots)
        self._step = first_step - 1
        self._writers: list[Thread] = []
        self._profile = self._build(max(steps - first_step + 1, 1)) if section.enable_profiling else None
        self._keeps_history = section.enable_memory_snapshot and device.type == "cuda"
        if section.enable_memory_snapshot and not self._keeps_history:
            logger.info("profiling.enable_memory_snapshot: a CPU has no allocator history, so nothing is recorded")

    def __enter__(self) -> Profiler:
        if self._keeps_history:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATOR_EVENTS)
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self, step: int) -> None:
        """Call after each step of the run."""
        self._step = step
        if self._profile is not None:
            running, self._profile = self._profile, None  # torch crashes if it is stopped after a step that raised
            with warnings.catch_warnings():
                # Each cycle is written when it ends, so it is correct that torch clears it then.
                warnings.filterwarnings("ignore", message=".*Profiler clears events", category=UserWarning)
                running.step()
            self._profile = running
        if self._keeps_history and step % self._section.profile_freq == 0:
            self._write_snapshot(f"iteration_{step}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish a trace in progress, wait for pending writes, and write a memory snapshot after an out-of-memory
        error."""
        if self._keeps_history:
            if isinstance(error, torch.OutOfMemoryError):
                self._write_snapshot(f"iteration_{self._step + 1}_exit")
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._profile is not None:
            self._profile.stop()
        for writer in self._writers:
            writer.join()

    def _build(self, steps: int) -> profile:
        section = self._section
        cycle = Cycle.of_run(section.profile_freq, section.profiler_warmup, section.profiler_active, steps)
        if cycle.length < section.profile_freq:
            what = f"the last {cycle.active} of them are recorded"
            logger.info(f"profiling: {steps} steps are less than one cycle; {what}")
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:  # torch's tracer prints a line at each start and stop; on a GPU its warnings are useful, so they stay
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        return _Profile(
            self._metadata,
            activities=activities,
            schedule=profiler_schedule(cycle, steps),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )

    def _metadata(self, since_ns: int) -> Mapping[str, Any]:
        return {
            "first_step": self._first_step,
            "machine": socket.gethostname(),
            **(self._notes(since_ns) if self._notes else {}),
        }

    def _write_trace(self, done: profile) -> None:
        """Torch writes plain JSON while training waits; a thread compresses it."""
        target = self._folder / f"iteration_{self._step}" / f"rank{self._rank}_trace.json.gz"
        unpacked = target.with_name(f".{target.stem}")
        with self._failures.tolerated(str(self._folder)):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                done.export_chrome_trace(str(unpacked))
                _check_complete(unpacked)
            except RuntimeError as error:  # from torch, which does not report all failures
                raise OSError(str(error)) from error
            self._pack_in_thread(unpacked, target)
            return
        with suppress(OSError):  # frees disk space for other files
            unpacked.unlink(missing_ok=True)

    def _pack_in_thread(self, unpacked: Path, target: Path) -> None:
        writer = Thread(target=_pack, args=(unpacked, target, self._failures), name="trace")
        writer.start()
        self._writers = [*(old for old in self._writers if old.is_alive()), writer]

    def _write_snapshot(self, name: str) -> None:
        target = self._snapshots / name / f"rank{self._rank}_memory_snapshot.pickle"
        with self._failures.tolerated(str(self._snapshots)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)
            logger.info(f"memory snapshot: {target}")


def profiler_schedule(cycle: Cycle, steps: int) -> Callable[[int], ProfilerAction]:
    """The profiler's action at a step, counted from 0 at the first one. Each cycle's last `active` steps are recorded,
    and no cycle begins after the last of all `steps`."""

    def action(step: int) -> ProfilerAction:
        if step >= steps:
            return ProfilerAction.NONE
        left = cycle.length - step % cycle.length  # steps of this cycle from this one on
        if left == 1:
            return ProfilerAction.RECORD_AND_SAVE
        if left <= cycle.active:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if left <= cycle.active + cycle.warmup else ProfilerAction.NONE

    return action


def _check_complete(trace: Path) -> None:
    """Raise OSError if the trace is incomplete, because torch does not report a full disk."""
    end = b""
    with suppress(FileNotFoundError), trace.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 16, 0))
        end = file.read().rstrip()
    if not end.endswith(b"}"):
        raise OSError(errno.ENOSPC, "torch wrote an incomplete trace: no space left, or a quota")


def _pack(unpacked: Path, target: Path, failures: WriteFailures) -> None:
    """Compress a trace. Readers see the complete file or none."""
    packing = target.with_name(f".{target.name}")
    try:
        with failures.tolerated(str(target.parent.parent)):
            with unpacked.open("rb") as source, gzip.open(packing, "wb", compresslevel=FAST) as packed:
                shutil.copyfileobj(source, packed, 1 << 20)
            packing.rename(target)
            logger.info(f"profiler trace: {target}")
    finally:
        for half in (unpacked, packing):
            with suppress(OSError):
                half.unlink(missing_ok=True)
