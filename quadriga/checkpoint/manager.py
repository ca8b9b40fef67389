"""When to save and what to load: the policy of `[checkpoint]` over `folder.py` (names) and `tensors.py` (bytes).

    manager = CheckpointManager(section, folder, group)
    found = manager.find()                                   # verified, byte by byte; no tensor is touched
    tensors = {"model": ModelState(parts), "optimizer": OptimizerState(parts, optimizers)}
    if found: manager.load(found, tensors)                   # found.step, found.extra say where the run stood
    ...
    if manager.should_save(step, last=step == steps): manager.save(step, tensors, extra, last=step == steps)
    ...
    manager.close()

Every method is to be called by all ranks together. `torch.distributed.checkpoint` is imported at the first load or
save, so that a plain start does not pay for it.
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
from quadriga.checkpoint.ranks import on_all_ranks, on_first_rank
from quadriga.checkpoint.search import CheckpointSearch
from quadriga.checkpoint.titan import TitanTensorNames
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError
from quadriga.json_collectives import gather_json
from quadriga.log import logger
from quadriga.units import format_seconds

if TYPE_CHECKING:
    from quadriga.checkpoint.tensors import Staging

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]
RANDOM = "random"  # the part of the generators, which differ from machine to machine
LogEvent = Callable[..., None]  # log_event(event, step, **facts): see quadriga.metrics.events


class Stateful(Protocol):
    """What can be saved: `state_dict` gives its tensors, not copies, by flat names; see `states.py`."""

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
        """`group`: a gloo group of all ranks and of no other use (asynchronous saves run beside training); None: one
        process alone. `log_event` hears what happens. Cleans up what a killed run left, so the caller must hold the run
        folder's lock. Raises UserError where nothing can be written."""
        self._section, self._folder, self._group = section, str(folder), group
        self._first_rank = group is None or dist.get_rank(group) == 0
        self._log_event = log_event if log_event is not None and self._first_rank else _discard
        self._last_save = time.monotonic()
        self._running: _BackgroundSave | None = None
        self._staging: Staging | None = None
        self._saved: int | None = None  # the newest step that this run saved, or went on from
        self._refused: set[int] = set()  # steps whose files are known to be damaged
        self._remains: list[str] = []
        if section.enable and not section.load_only:
            self._remains = self.on_first_rank(self._clean_up)

    def find(self) -> CheckpointInfo | None:
        """What the run starts from: its own newest checkpoint whose every byte is as it was written (or that of
        `load_step`), else `initial_load_path`, else None.

        Raises UserError where what the section names is not there, and CheckpointError with exit code 3 where
        checkpoints were published and none of them is good: nothing starts from scratch in silence.
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
        self, found: CheckpointInfo, tensors: Mapping[str, Stateful], titan_names: TitanTensorNames | None = None
    ) -> None:
        """Fill the given states from a checkpoint, saved on whatever layout. Only the model where `found.resume` is
        False; nothing that `exclude_from_loading` names. `titan_names`: for a checkpoint of torchtitan. Raises
        UserError where it does not fit them."""
        wanted = {
            part: state
            for part, state in tensors.items()
            if part not in self._section.exclude_from_loading and (found.resume or part == "model")
        }
        absent = sorted(wanted.keys() - set(found.contents))
        if absent:
            raise UserError(messages.missing_contents(found, absent))
        from quadriga.checkpoint.tensors import load_tensors

        start = time.monotonic()
        loaded = {part: state.state_dict() for part, state in wanted.items()}
        unfilled: list[str] = []
        if found.trainer:
            self._load_titan(found, _flat(loaded), titan_names)
        else:
            foreign = not found.files  # it may hold more than weights, and name them as the model does
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

        on_all_ranks(self._group, restore_states)  # the generators of one rank may be refused
        self._saved = found.step if found.resume else None
        seconds = time.monotonic() - start
        logger.info(f"loaded {found.path} in {format_seconds(seconds)}")
        self._log_event("resume", found.step, path=found.path, seconds=seconds)

    def _load_titan(self, found: CheckpointInfo, tensors: Tensors, names: TitanTensorNames | None) -> None:
        from quadriga.checkpoint.titan_read import read_titan

        if names is None:
            raise CheckpointError(f"{found.path} was saved by {found.trainer}, whose tensors nothing here knows")
        read_titan(found.location, tensors, names, self._group, retries=self._section.storage_retries)

    def should_save(self, step: int, last: bool, wanted: bool = False) -> bool:
        """Whether to save after this step. `wanted`: somebody asked for it, or the minutes have passed; all ranks
        must say the same."""
        section = self._section
        if not section.enable or section.load_only:
            return False
        return wanted or last or step % section.interval == 0 or (step == 1 and section.enable_first_step_checkpoint)

    def interval_has_passed(self) -> bool:
        """Whether, by this rank's clock, `interval_minutes` have passed since the last save."""
        minutes = self._section.interval_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def save(self, step: int, tensors: Mapping[str, Stateful], extra: Mapping[str, Any], last: bool = False) -> None:
        """Save the states and `extra` (JSON-able, the first rank's counts) as `step-N`, then delete what is outdated.

        With `async_mode` only the copy to host memory is waited for; a save that is still being written is waited for
        first. A save that fails is told, and older ones are whole; where `on_save_failure` is "stop", and for the last
        one, CheckpointError is raised on every rank.
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
        copies, extra_copy = self._staged(held), deepcopy(dict(extra))  # training goes on and changes both
        blocked = time.monotonic() - asked
        self._running = _BackgroundSave(
            step, blocked, lambda: self._write(step, copies, contents, extra_copy, began, blocked)
        )

    def is_saved(self, step: int) -> bool:
        """Whether the state of this step is published, or being written."""
        return step in (self._saved, self._running.step if self._running else None)

    def close(self) -> None:
        """Wait for a save that is still being written. Raises CheckpointError where it failed."""
        self._wait_for_running(last=True)

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """The result of `work` as JSON makes it, done by the first rank alone; its error is raised on every rank."""
        return on_first_rank(self._group, work)

    def _staged(self, held: Tensors) -> Tensors:
        from quadriga.checkpoint.tensors import Staging

        if self._staging is None:
            wanted = self._section.async_mode == "async_with_pinned_mem"
            possible = any(value.device.type == "cuda" for value in held.values())  # pinning would open a GPU
            if wanted and not possible:
                logger.info("checkpoints: no tensor is on CUDA, so copies are made in ordinary, unpinned memory")
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
        """`blocked`: seconds that training waited for this save; None: for all of it."""
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
        """The name, and the bytes under it. Raises CheckpointError where what was written is not there."""
        name = folders.publish(self._folder, step, contents, extra, location, hashes)
        try:
            return name, folders.checkpoint_bytes(folders.read_checkpoint(name))
        except InvalidCheckpoint as reason:
            raise CheckpointError(str(reason)) from reason

    def _delete_old(self, step: int) -> list[int]:
        """The steps that were deleted. `step` is saved, and stays so where others cannot be deleted."""
        section = self._section
        try:
            return folders.delete_old(self._folder, section.keep_latest_k, section.keep_every, self._refused, step)
        except (OSError, UserError) as error:
            logger.warning(f"step {step} is saved, but older checkpoints could not be deleted: {error}")
            return []

    def _gathered(self, hashes: dict[str, str]) -> dict[str, str]:
        """Of all ranks' files, on the first rank."""
        if self._group is None:
            return hashes
        gathered = gather_json(hashes, self._group)
        return {name: digest for one in gathered or () for name, digest in one.items()}

    def _after_failure(self, step: int, location: str, error: Exception) -> str:
        """Give back the room that the failed save took; what to tell."""
        if self._first_rank and location:
            with suppress(OSError):
                folders.remove_failed_save(self._folder, step, location)
        return messages.save_failed(self._folder, step, error)

    def _clean_up(self) -> list[str]:
        try:
            try_to_write(self._folder)
        except OSError as error:  # better now than after the first hours
            raise UserError(messages.cannot_be_written(self._folder, error)) from error
        remains = folders.unpublished_in(self._folder)
        try:
            if done := folders.clean_up(self._folder):
                logger.warning(f"{self._folder}: left by a run that ended in a save: {', '.join(done)}")
        except OSError as error:  # of an object store: remains take room, and are no reason not to start
            logger.warning(f"{self._folder}: what a run that ended in a save left could not be removed: {error}")
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
        """A save has failed: train on, or stop, as configured. After the last one there is nothing to train on for."""
        self._log_event("save_failed", step, reason=str(error), blocked_seconds=blocked)
        if last or self._section.on_save_failure == "stop":
            raise error
        logger.error(f"{error}\ntraining goes on, and the next save is tried in its turn")


class _BackgroundSave:
    """One save in a thread of its own, which kept training waiting for `blocked` seconds; `wait` raises what it
    raised."""

    def __init__(self, step: int, blocked: float, work: Callable[[], None]) -> None:
        self.step, self.blocked, self._work = step, blocked, work
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)  # a failing run does not wait
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _lower_thread_priority()
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the save is waited for
            self._error = error


def _lower_thread_priority() -> None:
    """Let this thread have what training leaves of the processor; when training waits for a save, that is all of it.

    Linux schedules threads one by one; elsewhere nothing is done, since a whole process would be slowed down.
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
