"""When to save and what to load: the policy of `[checkpoint]`, on top of `folder.py` (names) and `tensors.py` (bytes).

    manager = CheckpointManager(section, folder, group)
    found = manager.find()                                   # verified byte for byte; no tensor is changed
    tensors = {"model": ModelState(parts), "optimizer": OptimizerState(parts, optimizers)}
    if found: manager.load(found, tensors)                   # found.step, found.extra: the state of the run
    ...
    if manager.should_save(step, last=step == steps): manager.save(step, tensors, extra, last=step == steps)
    ...
    manager.close()

Call every method on all ranks. `torch.distributed.checkpoint` is imported at the first load or save, so that a start
without checkpoints does not take the time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from threading import Thread, get_native_id
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import messages
from quadriga.checkpoint.files import Location, try_to_write
from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo, InvalidCheckpoint
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.ranks import on_all_ranks, on_first_rank
from quadriga.checkpoint.search import CheckpointSearch
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError
from quadriga.json_collectives import gather_json
from quadriga.log import logger
from quadriga.units import format_seconds

if TYPE_CHECKING:
    from quadriga.checkpoint.staging import Staging

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]
RANDOM = "random"  # the part with the random generators, which differ between machines
LogEvent = Callable[..., None]  # log_event(event, step, **facts): see quadriga.metrics.events


class Stateful(Protocol):
    """A state that can be saved. `state_dict` returns its tensors, not copies, by flat names; see `tensors.py`."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None: ...


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run folder."""

    def __init__(
        self,
        section: Checkpoint,
        folder: Location,
        group: dist.ProcessGroup | None = None,
        log_event: LogEvent | None = None,
    ) -> None:
        """`group`: a gloo group of all ranks without other use, because asynchronous saves run during training; None: a
        single process. `log_event` receives the events. Removes the files of unfinished saves, so the caller must hold
        the lock of the run folder. Raises UserError if the folder cannot be written."""
        self._section, self._folder, self._group = section, str(folder), group
        self._first_rank = group is None or dist.get_rank(group) == 0
        self._log_event = log_event if log_event is not None and self._first_rank else _discard
        self._last_save = time.monotonic()
        self._running: _BackgroundSave | None = None
        self._staging: Staging | None = None
        self._saved: int | None = None  # the newest step that this run saved or resumed from
        self._refused: set[int] = set()  # steps whose files are known to be damaged
        self._remains: list[str] = []
        if section.enable and not section.load_only:
            self._remains = self.on_first_rank(self._clean_up)

    def find(self) -> CheckpointInfo | None:
        """The checkpoint that the run starts from: its own newest one with correct hashes (or that of `load_step`),
        else `initial_load_path`, else None.

        Raises UserError if a configured checkpoint does not exist, and CheckpointError with exit code 3 if published
        checkpoints exist and none is good, so that a run never starts from scratch silently.
        """
        if not self._section.enable:
            return None
        search = CheckpointSearch(self._section, self._folder, self._group, self.on_first_rank)
        found = search.find_own(self._remains)
        self._refused = set(search.refused)
        if found is not None and search.refused:
            self._log_event("fallback", found.step, refused=list(search.refused.values()), steps_lost=search.steps_lost)
        if found is None and self._section.initial_load_path and not self._section.initial_load_in_hf:
            found = search.find_initial(self._section.initial_load_path)
        if found is None:
            return None
        kept = {part: value for part, value in found.extra.items() if part not in self._section.exclude_from_loading}
        return replace(found, extra=kept)

    def load(
        self, found: CheckpointInfo, tensors: Mapping[str, Stateful], titan_names: TensorNames | None = None
    ) -> None:
        """Fills the given states from a checkpoint of any layout: only the model if `found.resume` is False, and not
        the parts in `exclude_from_loading`. `titan_names`: for a checkpoint of torchtitan. Raises UserError if the
        checkpoint does not fit the states."""
        wanted = {
            part: state
            for part, state in tensors.items()
            if part not in self._section.exclude_from_loading and (found.resume or part == "model")
        }
        if RANDOM in wanted and RANDOM not in found.contents:
            logger.info("random generators that are not in the checkpoint start anew")
            del wanted[RANDOM]
        absent = sorted(wanted.keys() - set(found.contents))
        if absent:
            raise UserError(messages.missing_contents(found, absent))
        from quadriga.checkpoint.load import load_tensors

        start = time.monotonic()
        loaded = {part: state.state_dict() for part, state in wanted.items()}
        unfilled: list[str] = []
        if found.trainer:
            self._load_titan(found, _flat(loaded), titan_names)
        else:
            foreign = not found.files  # it can have more than weights, and name them without a prefix
            unfilled, unused = load_tensors(
                found.location,
                _flat(loaded),
                self._group,
                facts=found.files,
                may_hold_more=foreign,
                prefix="model." if foreign else "",
                retries=self._section.storage_retries,
                optional=f"{RANDOM}.",
            )
            messages.log_generator_changes(unfilled, unused)

        def restore_states() -> None:
            for part, state in wanted.items():
                state.load_state_dict(
                    {name: value for name, value in loaded[part].items() if f"{part}.{name}" not in unfilled}
                )

        on_all_ranks(self._group, restore_states)  # the generators of a single rank can be refused
        self._saved = found.step if found.resume else None
        seconds = time.monotonic() - start
        logger.info(f"loaded {found.path} in {format_seconds(seconds)}")
        self._log_event("resume", found.step, path=found.path, seconds=seconds)

    def _load_titan(self, found: CheckpointInfo, tensors: Tensors, names: TensorNames | None) -> None:
        from quadriga.checkpoint.load import read_titan

        if names is None:
            raise CheckpointError(f"{found.path} was saved by {found.trainer}, and its tensor names are unknown")
        read_titan(found.location, tensors, names, self._group, retries=self._section.storage_retries)

    def should_save(self, step: int, last: bool, wanted: bool = False) -> bool:
        """Whether to save after this step. `wanted`: a save was requested, or `interval_minutes` have passed; equal on
        all ranks."""
        section = self._section
        if not section.enable or section.load_only:
            return False
        return wanted or last or step % section.interval == 0 or (step == 1 and section.enable_first_step_checkpoint)

    def interval_has_passed(self) -> bool:
        """Whether `interval_minutes` have passed since the last save, by this rank's clock."""
        minutes = self._section.interval_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def save(self, step: int, tensors: Mapping[str, Stateful], extra: Mapping[str, Any], last: bool = False) -> None:
        """Saves the states and `extra` (JSON values; those of the first rank) as `step-N`, then deletes outdated steps.

        First waits for a save in progress. With `async_mode`, this waits only for the copy to host memory. A failed
        save is reported, and older checkpoints stay complete. If `on_save_failure` is "stop", and for the last save,
        CheckpointError is raised on every rank.
        """
        asked = time.monotonic()
        self._wait_for_running(last)
        began = self._last_save = time.monotonic()
        self._log_event("save_begin", step, path=folders.published_path(self._folder, step))
        model_only = last and self._section.last_save_model_only
        contents = ("model",) if model_only else tuple(tensors)
        held = _flat({part: tensors[part].state_dict() for part in contents})
        if model_only:
            held = _cast_floats(held, getattr(torch, self._section.export_dtype))
        if self._section.async_mode == "disabled":
            try:
                self._write(step, held, contents, extra, began)
            except CheckpointError as error:
                self._handle_failure(error, step, last, blocked=time.monotonic() - asked)
            return
        copies, extra_copy = self._staged(held), deepcopy(dict(extra))  # training continues and changes both
        blocked = time.monotonic() - asked
        self._running = _BackgroundSave(
            step, blocked, lambda: self._write(step, copies, contents, extra_copy, began, blocked)
        )

    def is_saved(self, step: int) -> bool:
        """Whether the state of this step is published, or being written."""
        return step in (self._saved, self._running.step if self._running else None)

    def close(self) -> None:
        """Waits for a save in progress. Raises CheckpointError if it failed."""
        self._wait_for_running(last=True)

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """The result of `work` on the first rank, converted through JSON. Its error is raised on every rank."""
        return on_first_rank(self._group, work)

    def _staged(self, held: Tensors) -> Tensors:
        from quadriga.checkpoint.staging import Staging

        if self._staging is None:
            wanted = self._section.async_mode == "async_with_pinned_mem"
            possible = any(value.device.type == "cuda" for value in held.values())  # pinning would initialize CUDA
            if wanted and not possible:
                logger.info("checkpoints: no tensor is on CUDA, so copies are in unpinned memory")
            self._staging = Staging(pinned=wanted and possible)
        return self._staging.copy(held)

    def _write(
        self,
        step: int,
        tensors: Tensors,
        contents: tuple[str, ...],
        extra: Mapping[str, Any],
        began: float,
        blocked: float | None = None,
    ) -> None:
        """`blocked`: seconds that training waited for this save; None: the whole save."""
        from quadriga.checkpoint.tensors import save_tensors

        section, location = self._section, ""
        try:
            location = self.on_first_rank(lambda: folders.prepare(self._folder, step))
            hashes = self._gathered(save_tensors(location, tensors, self._group, section.storage_retries))
            name, size = self.on_first_rank(lambda: self._publish(step, contents, extra, location, hashes))
        except (OSError, CheckpointError) as error:
            raise CheckpointError(self._after_failure(step, location, error)) from error
        self._saved = step
        self._refused.discard(step)
        gone = self.on_first_rank(lambda: self._delete_old(step))
        seconds = time.monotonic() - began
        removed = f"; deleted {', '.join(f'step-{old}' for old in gone)}" if gone else ""
        logger.info(f"saved {name} in {format_seconds(seconds)}{removed}")
        if self._first_rank:
            facts = {"path": name, "seconds": seconds, "blocked_seconds": seconds if blocked is None else blocked}
            self._log_event("save_end", step, **facts, bytes=size)

    def _publish(
        self, step: int, contents: tuple[str, ...], extra: Mapping[str, Any], location: str, hashes: dict[str, str]
    ) -> tuple[str, int]:
        """The name of the checkpoint, and its bytes. Raises CheckpointError if it is incomplete after the write."""
        name = folders.publish(self._folder, step, contents, extra, location, hashes)
        try:
            return name, folders.checkpoint_bytes(folders.read_checkpoint(name))
        except InvalidCheckpoint as reason:
            raise CheckpointError(str(reason)) from reason

    def _delete_old(self, step: int) -> list[int]:
        """The deleted steps. If deletion fails, only a warning is logged, because `step` is saved."""
        section = self._section
        try:
            return folders.delete_old(self._folder, section.keep_latest_k, section.keep_every, self._refused, step)
        except (OSError, UserError) as error:
            logger.warning(f"step {step} is saved, but older checkpoints could not be deleted: {error}")
            return []

    def _gathered(self, hashes: dict[str, str]) -> dict[str, str]:
        """The hashes of all ranks' files, on the first rank."""
        if self._group is None:
            return hashes
        gathered = gather_json(hashes, self._group)
        return {name: digest for one in gathered or () for name, digest in one.items()}

    def _after_failure(self, step: int, location: str, error: Exception) -> str:
        """Removes the files of a failed save. Returns the message."""
        if self._first_rank and location:
            with suppress(OSError):
                folders.remove_failed_save(self._folder, step, location)
        return messages.save_failed(self._folder, step, error)

    def _clean_up(self) -> list[str]:
        try:
            try_to_write(self._folder)
        except OSError as error:  # reported before training, not at the first save
            raise UserError(messages.cannot_be_written(self._folder, error)) from error
        remains = folders.unpublished_in(self._folder)
        try:
            if done := folders.clean_up(self._folder):
                logger.warning(f"{self._folder}: left by a run that ended during a save: {', '.join(done)}")
        except OSError as error:  # of an object store: the rest takes space, but does not prevent the start
            logger.warning(f"{self._folder}: the rest of an unfinished save could not be removed: {error}")
        return remains

    def _wait_for_running(self, last: bool) -> None:
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            running.wait()
        except CheckpointError as error:
            self._handle_failure(error, running.step, last, running.blocked)

    def _handle_failure(self, error: CheckpointError, step: int, last: bool, blocked: float) -> None:
        """Handles a failed save: training continues or stops, as configured. A failed last save always raises."""
        self._log_event("save_failed", step, reason=str(error), blocked_seconds=blocked)
        if last or self._section.on_save_failure == "stop":
            raise error
        logger.error(f"{error}\ntraining continues; the next save is tried at its regular step")


class _BackgroundSave:
    """One save in its own thread. `blocked`: seconds that training waited for it. `wait` raises the error of the
    thread."""

    def __init__(self, step: int, blocked: float, work: Callable[[], None]) -> None:
        self.step, self.blocked, self._work = step, blocked, work
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)  # a failing run does not wait for it
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _lower_thread_priority()
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self._error = error


def _lower_thread_priority() -> None:
    """Lets this thread use only processor time that training leaves; while training waits for a save, that is all.

    Only on Linux, which schedules threads individually. Elsewhere this would slow down the whole process.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(get_native_id(), os.SCHED_IDLE, os.sched_param(0))


def _discard(_event: str, _step: int, **_facts: Any) -> None:
    return None


def _flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def _cast_floats(tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
