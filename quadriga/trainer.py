"""The part of the Python API that trains: `build` and `Trainer`.

A trainer is what `train.loop.run` builds and drives, with the caller in the place of the loop. At its end, the process
is as before: signal handlers, logging handlers, environment variables, random state, numerics and process group.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch._inductor.config
import torch.distributed as dist

from quadriga.api import logger_as_it_was
from quadriga.checkpoint import folder as checkpoint_folder
from quadriga.comm import process_group
from quadriga.config import Run
from quadriga.errors import EXIT_OK, Fault, Problem, UserError
from quadriga.log import start_logging
from quadriga.metrics.jsonl import Record
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience import processes, stop_requests
from quadriga.resilience.failures import record_failure
from quadriga.resilience.progress import Progress
from quadriga.resilience.watchdog import Watchdog
from quadriga.train import header
from quadriga.train.backends import write_backends_record
from quadriga.train.build import TrainerParts, build_trainer
from quadriga.train.feed import DataFault
from quadriga.train.loop import (
    after_step,
    bytes_by_collective,
    export_last_step,
    finish_on_request,
    log_event,
    save,
    save_last_whole_step,
    validate,
)
from quadriga.train.state import TrainState
from quadriga.train.step import train_step


class Stopped(Fault):
    """The run was asked to stop, by a signal or the file STOP. `exit_code`: that of the command line, 75 after a
    save."""


def build(run: Run, *, log: bool = True) -> Trainer:
    """Build the trainer of a run, and resume from the newest checkpoint of its run folder, as the command line does.

    One process is one rank. Under torchrun, call this on all ranks. A process can have one trainer at a time; the next
    can be built after `close`.

    Args:
        run: the result of `resolve`, without `ranks`.
        log: print progress on standard error, as the command line does. False: the logger `quadriga` keeps the handlers
            and the level that it has.

    Raises:
        UserError: the run cannot be trained here, its folder is in use, or a file or a checkpoint does not fit it.
        Fault: the machine failed, or no checkpoint of the run folder is good.
    """
    if problems := _problems(run):
        raise UserError(*problems)
    environ, several, comm = os.environ, run.spec.world_size > 1, run.config.comm
    with ExitStack() as stack:
        stack.enter_context(_process_as_it_was(run))
        if log:
            stack.enter_context(logger_as_it_was())
            start_logging(environ)
        if environ.get("RANK", "0") == "0":
            stack.enter_context(processes.lock_run_folder(run.spec.folders.dump))
        watchdog = Watchdog(
            comm, run.config.checkpoint.timeout_seconds, Progress(), run.spec.folders.comm_traces, environ
        )
        stack.push(lambda kind, *_: process_group.stop() if kind is None or not several else None)
        if several:  # a single rank is idle while the user thinks, which is no hang, and no other rank waits for it
            processes.die_with_torchrun(environ)
            stack.enter_context(watchdog)
        with record_failure(run, watchdog.progress) as context:
            parts = build_trainer(run, environ, watchdog)
            context.events, context.last_step = parts.events, lambda: parts.state.step
            header.log_header(parts)
            first_step = parts.state.step + 1
            write_backends_record(parts.loggers, run, parts.backend, parts.events.attempt, first_step)
            log_event(parts, "ready")
        if several:  # a request is agreed on at the end of the next step, so it may not end this rank before
            stack.enter_context(parts.stop_requests.install_handlers())
        return Trainer(run, parts, stack.pop_all())


class Trainer:
    """A run between two steps. `build` makes it; call its methods on all ranks.

    Every method raises `UserError` for an error that the user can correct, and `Fault` for others with a report. After
    an error in a step, a save or an evaluation the trainer can only be closed, because its state may be incomplete.

    With one rank, SIGINT (Ctrl-C, or Jupyter's interrupt) during a method raises KeyboardInterrupt when the work is
    complete. A second one raises it at once, which counts as an error. Several ranks treat SIGINT as a request to stop.

    Attributes:
        run: the run as it was resolved.
    """

    def __init__(self, run: Run, parts: TrainerParts, stack: ExitStack) -> None:
        """`stack`: undoes what `build` did to the process."""
        self.run, self._parts, self._stack = run, parts, stack
        self._started_at = parts.state.step
        self._ended: str | None = None  # why no method but `close` can be called
        self._failed, self._exit_code = False, EXIT_OK
        self._validation = _LastValidation()
        parts.loggers.append(self._validation)
        stack.push(self._leave)
        stack.enter_context(parts.profiler)
        self._idle = ExitStack()  # the time between two calls is not training time
        self._idle.enter_context(parts.meter.paused())

    @property
    def state(self) -> TrainState:
        """Everything that a step changes: `step` counts finished steps, `parts` is the model of this rank."""
        return self._parts.state

    @property
    def finished(self) -> bool:
        """Whether all `training.steps` are done."""
        return self.state.step >= self.run.spec.steps

    @property
    def last_record(self) -> Record | None:
        """The newest training record of `metrics.jsonl`, with speed and memory; None before the first logging step."""
        return self._parts.last_record

    def step(self) -> StepMetrics:
        """Train one step, with all that the command line does after it: records, checks, and the saves and validations
        that are due.

        Returns:
            The metrics of the step. `loss` is the mean cross-entropy in nats per token over all ranks, `grad_norm` the
            norm before clipping. Both are tensors of shape () on the device; `float(metrics.loss)` waits for it.

        Raises:
            Stopped: a stop was requested; the step is complete, and saved if checkpoints are on.
            UserError: all steps are done, or a batch cannot be read; before the latter the last complete step is saved.
            Fault: the run must stop, for example after a NaN loss if `[health]` says so.
        """
        self._check_usable()
        if self.finished:
            fix = "raise training.steps; evaluate and save are still possible"
            raise UserError(Problem("training.steps", "all steps are done", str(self.run.spec.steps), fix=fix))
        parts, stopped = self._parts, None
        with self._operation():
            metrics = train_step(parts.state, parts.step_config, parts.mesh)
            cause = after_step(parts, metrics, self._started_at)
            if cause is not None:
                parts.checkpoints.close()  # the checkpoint is looked up
                self._exit_code = finish_on_request(parts, cause)
                name = stop_requests.stop_cause_name(cause)
                stopped = Stopped(f"{name}: stopped after step {metrics.step}", self._exit_code)
                self._ended = "it was asked to stop"
        if stopped is not None:
            raise stopped
        return metrics

    def evaluate(self) -> float:
        """The mean cross-entropy in nats per token on the held-out set of `[validation]`. Training is not affected.

        Raises:
            UserError: `validation.enable` is false, there are several sets, or the data cannot be read.
        """
        self._check_usable()
        if len(self.run.config.validation.sets) > 1:
            names = ", ".join(each.title for each in self.run.config.validation.sets)
            what, fix = "each set has a loss of its own", "call evaluate_sets, which returns all of them"
            raise UserError(Problem("validation.sets", what, names, fix=fix))
        (loss,) = self.evaluate_sets().values()
        return loss

    def evaluate_sets(self) -> dict[str, float]:
        """The mean cross-entropy in nats per token on each held-out set of `[[validation.sets]]`, by its name. A set
        without a name has that of its file or data set. Training is not affected.

        Raises:
            UserError: `validation.enable` is false, or the data cannot be read.
        """
        self._check_usable()
        if self._parts.validator is None:
            fix = "set it to true, and validation.dataset to the text"
            raise UserError(Problem("validation.enable", "there is no validation text", "false", fix=fix))
        with self._operation():
            validate(self._parts)
        return {each.title: self._validation.losses[each.label] for each in self.run.config.validation.read_sets}

    def save(self) -> str:
        """Save a checkpoint of the current step, unless there is one, and wait until it is complete.

        Returns:
            The folder or URL of the checkpoint.

        Raises:
            UserError: checkpoints are off.
            Fault: the checkpoint could not be written; older ones are complete.
        """
        self._check_usable()
        section, step, checkpoints = self.run.config.checkpoint, self.state.step, self._parts.checkpoints
        if not section.enable or section.load_only:
            key, value = ("checkpoint.load_only", "true") if section.enable else ("checkpoint.enable", "false")
            raise UserError(Problem(key, "checkpoints are not saved", value, fix=f"set {key} to the opposite"))
        with self._operation():
            if not checkpoints.is_saved(step):
                save(self._parts, last=False)
            checkpoints.close()  # waits for a save in the background
            folder = self.run.spec.folders.checkpoint
            found = checkpoints.on_first_rank(lambda: _path_of(checkpoint_folder.find_complete(folder, step)))
            if found is None:
                raise Fault(f"step {step} could not be saved in {folder} (see above)")
        return found

    def close(self) -> None:
        """End the run, and restore the process. Steps since the newest checkpoint are lost unless `save` was called.

        After the last step this also writes the Hugging Face export of `checkpoint.last_save_in_hf`. Further calls do
        nothing.
        """
        self._ended = self._ended or "it is closed"
        self._idle.close()
        fault = Fault("the trainer failed") if self._failed else None
        self._stack.__exit__(type(fault) if fault else None, fault, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """After an error on one of several ranks, nothing waits for the others, which may never come."""
        if error is not None and not isinstance(error, Stopped):
            self._failed = self._failed or self.run.spec.world_size > 1
        self.close()

    def _check_usable(self) -> None:
        if self._ended is not None:
            raise Fault(f"this trainer cannot be used: {self._ended}; build another, which resumes from its checkpoint")

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Around everything that can leave the state incomplete. Errors are recorded as the command line does."""
        parts, collects, unreadable = self._parts, gc.isenabled(), None
        gc.disable()  # `after_step` collects at fixed steps, because one slow rank delays all
        self._idle.close()
        with self._signals():
            try:
                with record_failure(self.run, parts.state.progress) as context:
                    context.events, context.last_step = parts.events, lambda: parts.state.step
                    try:
                        yield
                    except DataFault as fault:
                        context.on_all_ranks, unreadable = True, fault.error
                    if unreadable is not None:
                        save_last_whole_step(parts)
                        raise unreadable
            except BaseException:
                self._failed, self._ended = True, "it failed"
                raise
            finally:
                if collects:
                    gc.enable()
                self._idle.enter_context(parts.meter.paused())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """One rank handles signals while it works. Several ranks handle them all the time, also SIGINT."""
        if self.run.spec.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupted: list[int] = []
        before = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, before)
            interrupted.append(number)

        with self._parts.stop_requests.install_handlers():
            if before != signal.SIG_IGN:
                signal.signal(signal.SIGINT, on_interrupt)  # a second request to stop would end the process
            yield
        if interrupted:
            raise KeyboardInterrupt

    def _leave(self, kind: type[BaseException] | None, *_: Any) -> None:
        """End the run as `train.loop.run` does; after an error, only what does not wait for other ranks."""
        parts = self._parts
        if kind is not None:
            if self.run.spec.world_size == 1:
                with suppress(Exception):  # the first error is known already
                    parts.close()
            return
        with record_failure(self.run, parts.state.progress) as context:
            context.events, context.last_step = parts.events, lambda: parts.state.step
            parts.state.progress.enter_phase("leave")
            parts.close()
            if self.finished and self.state.step > self._started_at:
                export_last_step(self.run, self.state.step)
            reason = "finished" if self.finished else "closed" if self._exit_code == EXIT_OK else "asked to leave"
            log_event(parts, "end", code=self._exit_code, reason=reason, **bytes_by_collective(parts))
        parts.watchdog.stop()


class _LastValidation:
    """A logger that keeps the losses of the newest validation, by the names of its sets."""

    def __init__(self) -> None:
        self.losses: dict[str | None, float] = {}

    def write(self, record: Record) -> None:
        if record["kind"] == "validation":
            self.losses[record.get("set")] = float(record["loss"])

    def close(self) -> None:
        pass


def _path_of(found: checkpoint_folder.CheckpointInfo | None) -> str | None:
    return None if found is None else found.path


def _problems(run: Run) -> list[Problem]:
    """Why this process cannot build the run, which the command line would not start either."""
    ranks, needed = int(os.environ.get("WORLD_SIZE", "1")), run.spec.world_size
    problems = []
    if ranks != needed:
        fix = f"start this program with torchrun --nproc_per_node {needed}, or resolve the configuration without ranks"
        problems.append(Problem("WORLD_SIZE", f"the run has {needed} ranks, and this program {ranks}", fix=fix))
    if run.config.checkpoint.create_seed_checkpoint:
        fix = "remove the key, build, and call save before the first step"
        problems.append(Problem("checkpoint.create_seed_checkpoint", "this key is for the command line", fix=fix))
    if dist.is_initialized():
        what, fix = "this process has a process group already", "close the other trainer, or destroy the process group"
        problems.append(Problem("quadriga.build", what, fix=fix))
    return problems


@contextmanager
def _process_as_it_was(run: Run) -> Iterator[None]:
    """Afterwards, restore what a run changes in its process: variables, numerics, random state, current device."""
    variables, states = dict(os.environ), (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
    on_cuda = torch.cuda.is_initialized()  # not asked otherwise, because that would initialize CUDA
    device, cuda_random = (torch.cuda.current_device(), torch.cuda.get_rng_state_all()) if on_cuda else (0, [])
    precision, casts = torch.get_float32_matmul_precision(), torch._inductor.config.emulate_precision_casts
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for name in os.environ.keys() | variables.keys():
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]
        torch.set_rng_state(states[0])  # a resume sets all three
        random.setstate(states[1])
        np.random.set_state(states[2])
        torch.set_float32_matmul_precision(precision)
        torch._inductor.config.emulate_precision_casts = casts
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if on_cuda:
            torch.cuda.set_device(device)
            torch.cuda.set_rng_state_all(cuda_random)
        if run.config.compile.enable:
            torch.compiler.reset()  # the compiled code of a model that is gone would count against torch's limit
