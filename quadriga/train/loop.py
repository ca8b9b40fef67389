"""The run: build, go on from where it stood, step until done, leave everything that a run should leave."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

from quadriga.checkpoint import folder as checkpoint_folder
from quadriga.comm import process_group
from quadriga.config import Run
from quadriga.errors import EXIT_OK, Fault
from quadriga.log import logger
from quadriga.resilience import stop_requests
from quadriga.resilience.bad_steps import CommonFault
from quadriga.resilience.failures import record_failure
from quadriga.resilience.progress import Progress
from quadriga.resilience.watchdog import Watchdog
from quadriga.train import header
from quadriga.train.backends import write_backends_record
from quadriga.train.build import Trainer, build
from quadriga.train.feed import DataFault
from quadriga.train.hf import export_last_step
from quadriga.train.resume import saved_extra, saved_tensors
from quadriga.train.step import train_step


def run(run: Run, environ: Mapping[str, str]) -> int:
    """Train as `run` says, on this rank. Returns the exit code; faults are raised."""
    patience = run.config.checkpoint.timeout_seconds
    watchdog = Watchdog(run.config.comm, patience, Progress(), run.spec.folders.comm_traces, environ)
    with watchdog, record_failure(run, watchdog.progress) as context:
        if run.config.checkpoint.enable and header.log_if_finished(run):
            return EXIT_OK
        trainer = build(run, environ, watchdog)
        context.events, context.last_step = trainer.events, lambda: trainer.state.step
        if run.config.checkpoint.create_seed_checkpoint:
            save(trainer, last=False)
            trainer.close()
            return EXIT_OK
        start = time.perf_counter()
        header.log_header(trainer)
        write_backends_record(trainer.loggers, run, trainer.backend, trainer.events.attempt, trainer.state.step + 1)
        log_event(trainer, "ready")
        with trainer.stop_requests.install_handlers():
            unreadable: Exception | None = None
            try:
                stop_cause = train(trainer)
            except DataFault as fault:
                context.on_all_ranks, unreadable = True, fault.error
            if unreadable is not None:
                save_last_whole_step(trainer)
                raise unreadable
            # Not in a `finally`: a rank that fails leaves at once. Waiting for others in a broken run may never end,
            # and an error made by closing would hide the first one. Every line and event is on disk when it is written.
            trainer.state.progress.enter_phase("leave")
            trainer.close()
            if stop_cause is None:
                export_last_step(run, trainer.state.step)
            code = EXIT_OK if stop_cause is None else finish_on_request(trainer, stop_cause)
            reason = "finished" if stop_cause is None else "asked to leave"
            log_event(trainer, "end", code=code, reason=reason, **bytes_by_collective(trainer))
        trainer.watchdog.stop()
        if code == EXIT_OK:
            header.print_summary(trainer, time.perf_counter() - start)
        process_group.stop()
        return code


def train(trainer: Trainer) -> int | None:
    """From the step that the state stands at to the last one, or to one after which all ranks agreed to leave: then
    what asked for it."""
    state, spec, stop_cause = trainer.state, trainer.run.spec, None
    started_at = state.step
    gc.disable()  # collected when we choose, on all ranks at the same step: a straggler makes all wait
    with trainer.profiler:
        while state.step < spec.steps and stop_cause is None:
            metrics = train_step(state, trainer.step_config, trainer.mesh)
            if state.step == started_at + 1:
                process_group.tighten_timeouts(trainer.run.config.comm)
                trainer.watchdog.first_step_done()
            state.progress.enter_phase("record")
            record = trainer.meter.record(metrics)
            trainer.write(record)
            trainer.checks.after_step(metrics, record)
            trainer.profiler.step(state.step)
            if trainer.failures.reason is not None:
                trainer.stop_requests.report_write_failure()
            decision = trainer.stop_requests.sync(trainer.checkpoints.interval_has_passed())
            last = state.step == spec.steps
            stop_cause = None if last else decision.stop
            if decision.stop == stop_requests.BY_LOST_FOLDER:
                raise lost_folder_fault(trainer)
            if trainer.checkpoints.should_save(state.step, last, wanted=decision.save or stop_cause is not None):
                save(trainer, last)
            if trainer.validator and trainer.validator.is_due(state.step):
                validate(trainer)  # after the save: what ends a validation costs no step
            if state.step % trainer.run.config.training.gc_freq == 0:
                collect_garbage(trainer)
    return stop_cause


def save_last_whole_step(trainer: Trainer) -> None:
    """What is saved, and told, before a run ends that cannot read its data. Call on all ranks; raises nothing that
    would hide that."""
    state, section = trainer.state, trainer.run.config.checkpoint
    state.optimizer.zero_grad(set_to_none=True)
    if not section.enable or section.load_only or state.step == 0:
        return
    try:
        if not trainer.checkpoints.is_saved(state.step):
            save(trainer, last=False)
        trainer.checkpoints.close()
    except Fault as error:
        logger.error("%s", error)
        return
    path = trainer.checkpoints.on_first_rank(lambda: _saved_at(trainer.run.spec.folders.checkpoint, state.step))
    if path is not None:
        logger.info("the data cannot be read on; step %d is saved in %s: a start goes on from there", state.step, path)


def lost_folder_fault(trainer: Trainer) -> CommonFault:
    """What all ranks raise when the run folder is gone, or another one has its name."""
    folder, state = trainer.run.spec.folders.dump, trainer.state
    return CommonFault(
        f"the run folder {folder} was removed or replaced in mid-run: stopped after step {state.step}\n"
        "nothing was written into what has its name now; saves that lie elsewhere are whole\n"
        "to do: find out who removed it; restore it from a copy to go on from its newest save, or begin anew"
    )


def finish_on_request(trainer: Trainer, stop_cause: int) -> int:
    """The end of a run that was asked to leave; the exit code."""
    state, spec, section = trainer.state, trainer.run.spec, trainer.run.config.checkpoint
    log_event(trainer, "signal", name=stop_requests.stop_cause_name(stop_cause))
    trainer.stop_requests.mark_stopped()
    if stop_cause == stop_requests.BY_FAILED_WRITE and (not section.enable or section.load_only):
        raise write_failure_fault(trainer, None)
    if not section.enable or section.load_only:
        return stop_requests.log_exit(stop_cause, state.step, spec.steps, None)
    path = trainer.checkpoints.on_first_rank(lambda: _saved_at(spec.folders.checkpoint, state.step))
    if stop_cause == stop_requests.BY_FAILED_WRITE:
        raise write_failure_fault(trainer, path)
    if path is None:
        what = f"asked to leave, but step {state.step} could not be saved (see above)"
        raise Fault(f"{what}: a start goes on from the save before")
    return stop_requests.log_exit(stop_cause, state.step, spec.steps, path)


def write_failure_fault(trainer: Trainer, path: str | None) -> CommonFault:
    """What all ranks raise where `metrics.on_write_failure` says to stop; `path`: where the last step is saved."""
    reason = trainer.failures.reason or "another rank could not write its files"
    saved = f"saved in {path}" if path else "not saved"
    return CommonFault(
        f'{reason}, and metrics.on_write_failure is "stop"\n'
        f"stopped after step {trainer.state.step}, which is {saved}\n"
        "to do: make room or mend the folder, and start again; or train on without: --metrics.on_write_failure go_on"
    )


def _saved_at(folder: str, step: int) -> str | None:
    found = checkpoint_folder.find_complete(folder, step)
    return None if found is None else found.path


def log_event(trainer: Trainer, event: str, **facts: Any) -> None:
    """Add to the event log what is logged once for all ranks."""
    if trainer.events.rank == 0:
        trainer.events.log_event(event, trainer.state.step, **facts)


def bytes_by_collective(trainer: Trainer) -> dict[str, Any]:
    """What our own collectives carried on this rank, where there are any: bytes by kind of call."""
    return (
        {"carried": dict(trainer.shard_collectives.bytes_by_collective)}
        if trainer.shard_collectives and trainer.shard_collectives.bytes_by_collective
        else {}
    )


def validate(trainer: Trainer) -> None:
    assert trainer.validator is not None
    with trainer.meter.paused(), trainer.state.progress.within("validate"):
        start = time.perf_counter()
        loss, tokens = trainer.validator.mean_loss(trainer.state.parts, trainer.mesh)
        seconds = time.perf_counter() - start
    trainer.write(trainer.meter.validation(trainer.state.step, loss, tokens, seconds))


def save(trainer: Trainer, last: bool) -> None:
    trainer.checks.before_save()
    with trainer.meter.paused(), trainer.state.progress.within("save"):
        state = trainer.state
        trainer.checkpoints.save(state.step, saved_tensors(state), saved_extra(trainer.run, state), last=last)
    trainer.stop_requests.mark_saved()


def collect_garbage(trainer: Trainer) -> None:
    """The young generations each time; everything, with a report, where `training.gc_debug` asks for it."""
    if trainer.run.config.training.gc_debug:
        logger.info("garbage: %d objects collected, %d tracked", gc.collect(), len(gc.get_objects()))
    else:
        gc.collect(1)
