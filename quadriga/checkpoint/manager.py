"""When to save and what to load: the policy of `[checkpoint]` over `folder.py` (names) and `tensors.py` (bytes).

    manager = CheckpointManager(section, folder, group)
    found = manager.find()                                   # cheap: no tensor is touched
    tensors = {"model": ModelState(parts), "optimizer": OptimizerState(parts, optimizers)}
    if found: manager.load(found, tensors)                   # found.step, found.extra say where the run stood
    ...
    if manager.due(step, last=step == steps): manager.save(step, tensors, extra, last=step == steps)
    ...
    manager.close()

Every method is to be called by all ranks together. `torch.distributed.checkpoint` is imported at the first load or
save, so that a plain start does not pay for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.folder import CheckpointError, Found, NotWhole
from quadriga.config.schema import Checkpoint
from quadriga.errors import Problem, UserError
from quadriga.log import logger
from quadriga.units import show_bytes, show_seconds

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]


class Stateful(Protocol):
    """What can be saved: `state_dict` gives its tensors, not copies, by flat names; see `states.py`."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, loaded: Mapping[str, torch.Tensor]) -> None: ...


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run folder."""

    def __init__(self, section: Checkpoint, folder: str | Path, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all ranks and of no other use (asynchronous saves run beside training); None: one
        process alone. Cleans up what a killed run left, so the caller must hold the run folder's lock. Raises UserError
        for an `async_mode` that is not supported."""
        if section.enable and section.async_mode == "async_with_pinned_mem":
            raise UserError(_no_pinning())
        self._section, self._folder, self._group = section, Path(folder), group
        self._first_rank = group is None or dist.get_rank(group) == 0
        self._last_save = time.monotonic()
        self._running: _BackgroundSave | None = None
        if section.enable and not section.load_only:
            self._on_first_rank(self._clean_up)

    def find(self) -> Found | None:
        """What the run starts from: its own checkpoint (`load_step` or the newest whole one), else
        `initial_load_path`, else None. Raises UserError where what the section names is not there."""
        return self._on_first_rank(self._look) if self._section.enable else None

    def load(self, found: Found, tensors: Mapping[str, Stateful]) -> None:
        """Fill the given states from a checkpoint, saved on whatever layout. Only the model where `found.resume` is
        False; nothing that `exclude_from_loading` names. Raises UserError where it does not fit them."""
        wanted = {
            part: state
            for part, state in tensors.items()
            if part not in self._section.exclude_from_loading and (found.resume or part == "model")
        }
        absent = sorted(wanted.keys() - set(found.contents))
        if absent:
            raise UserError(_holds_no(found, absent))
        from quadriga.checkpoint.tensors import read

        start = time.monotonic()
        loaded = {part: state.state_dict() for part, state in wanted.items()}
        read(Path(found.path), _flat(loaded), self._group)
        for part, state in wanted.items():
            state.load_state_dict(loaded[part])
        logger.info(f"loaded {found.path} in {show_seconds(time.monotonic() - start)}")

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after this step. Ask once a step; the first rank's clock decides for all."""
        section = self._section
        if not section.enable or section.load_only:
            return False
        if last or step % section.interval == 0 or (step == 1 and section.enable_first_step_checkpoint):
            return True
        return section.interval_minutes is not None and self._minutes_have_passed(section.interval_minutes)

    def save(self, step: int, tensors: Mapping[str, Stateful], extra: Mapping[str, Any], last: bool = False) -> None:
        """Save the states and `extra` (JSON-able, the first rank's counts) as `step-N`, then delete what is outdated.

        With `async_mode` only the copy to host memory is waited for; a save that is still being written is waited for
        first. Raises CheckpointError on every rank where this save or the one before failed; older ones are whole.
        """
        self._finish_running()
        self._last_save = time.monotonic()
        model_only = last and self._section.last_save_model_only
        contents = ("model",) if model_only else tuple(tensors)
        held = _flat({part: tensors[part].state_dict() for part in contents})
        if model_only:
            held = _exported(held, getattr(torch, self._section.export_dtype))
        if self._section.async_mode == "disabled":
            self._write(step, held, contents, extra)
            return
        from quadriga.checkpoint.tensors import snapshot

        copies, words = snapshot(held), deepcopy(dict(extra))  # training goes on and changes both
        self._running = _BackgroundSave(lambda: self._write(step, copies, contents, words))

    def close(self) -> None:
        """Wait for a save that is still being written. Raises CheckpointError where it failed."""
        self._finish_running()

    def _write(self, step: int, tensors: Tensors, contents: tuple[str, ...], extra: Mapping[str, Any]) -> None:
        from quadriga.checkpoint.tensors import write

        start = time.monotonic()
        place = folders.hidden(self._folder, step)
        try:
            self._on_first_rank(lambda: folders.prepare(self._folder, step))
            write(place, tensors, self._group)
            name = self._on_first_rank(lambda: folders.publish(self._folder, step, contents, extra))
            gone = self._on_first_rank(lambda: folders.delete_old(self._folder, self._section.keep_latest_k))
        except (OSError, CheckpointError) as error:
            raise CheckpointError(self._after_failure(step, error)) from error
        removed = f"; deleted {', '.join(f'step-{old}' for old in gone)}" if gone else ""
        logger.info(f"saved {name} in {show_seconds(time.monotonic() - start)}{removed}")

    def _after_failure(self, step: int, error: Exception) -> str:
        """Give back the room that the failed save took; what to tell."""
        if self._first_rank:
            with suppress(OSError):
                shutil.rmtree(folders.hidden(self._folder, step))
        whole = [f"step-{found.step}" for found in folders.whole_in(self._folder)]
        lines = [f"step {step} was not saved: {error}", f"whole in {self._folder}: {', '.join(whole) or 'none'}"]
        with suppress(OSError):
            place = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
            lines.append(f"room left there: {show_bytes(shutil.disk_usage(place).free)}")
        lines.append("make room or mend the folder, then start again: the run goes on from the newest whole one")
        return "\n".join(lines)

    def _look(self) -> Found | None:
        section, whole = self._section, folders.whole_in(self._folder)
        for reason in folders.damaged_in(self._folder):
            logger.warning(f"{reason}: this checkpoint is passed over")
        own = folders.find(self._folder, section.load_step)
        if own is None and section.load_step >= 0:
            raise UserError(_no_such_step(section.load_step, self._folder, whole))
        if own is not None:
            if own.step < whole[-1].step:
                logger.warning(f"step-{whole[-1].step} is newer: a start without load_step takes that one")
            kept = {part: value for part, value in own.extra.items() if part not in section.exclude_from_loading}
            return replace(own, extra=kept)
        return self._look_elsewhere(section.initial_load_path) if section.initial_load_path else None

    def _look_elsewhere(self, path: str) -> Found:
        try:
            found = folders.find(Path(path)) or folders.read(Path(path))
        except NotWhole as reason:
            raise UserError(
                Problem(
                    where="checkpoint.initial_load_path",
                    value=path,
                    what=f"no checkpoint of ours: {reason}",
                    allowed="a folder `step-N` of a run, or the folder that holds them",
                )
            ) from reason
        if self._section.initial_load_model_only:
            return replace(found, resume=False, extra={})
        kept = {part: value for part, value in found.extra.items() if part not in self._section.exclude_from_loading}
        return replace(found, extra=kept)

    def _clean_up(self) -> None:
        if done := folders.clean_up(self._folder):
            logger.warning(f"{self._folder}: left by a run that ended in a save: {', '.join(done)}")

    def _minutes_have_passed(self, minutes: float) -> bool:
        passed = torch.tensor(time.monotonic() - self._last_save >= 60 * minutes, dtype=torch.uint8)
        if self._group is not None:
            dist.broadcast(passed, 0, group=self._group)
        return bool(passed)

    def _finish_running(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.wait()

    def _on_first_rank(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by the first rank alone; its error is raised on every rank."""
        if self._group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self._first_rank:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for ever
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


class _BackgroundSave:
    """One save in a thread of its own; `wait` raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)  # a failing run does not wait
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the save is waited for
            self._error = error


def _flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def _exported(tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _no_pinning() -> Problem:
    return Problem(
        where="checkpoint.async_mode",
        value="async_with_pinned_mem",
        what="copying to pinned memory is not supported yet",
        allowed='"disabled", "async" (which copies to ordinary host memory)',
    )


def _no_such_step(step: int, folder: Path, whole: list[Found]) -> Problem:
    return Problem(
        where="checkpoint.load_step",
        value=str(step),
        what=f"{folder} has no whole checkpoint of this step",
        allowed=", ".join(str(found.step) for found in whole) or "none is there: leave it at -1",
    )


def _holds_no(found: Found, absent: list[str]) -> Problem:
    return Problem(
        where=found.path,
        what=f"holds {' and '.join(found.contents)}, but no {' and '.join(absent)}: a run cannot go on from it",
        fix="start a new run from it: another job.dump_folder, and this folder as checkpoint.initial_load_path",
    )
