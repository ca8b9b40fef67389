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
from quadriga.resilience.failures import witnessed
from quadriga.resilience.progress import Progress
from quadriga.resilience.watchdog import Watchdog
from quadriga.train import header
from quadriga.train.backends import leave_served
from quadriga.train.build import Trainer, build
from quadriga.train.feed import DataFault
from quadriga.train.hf import export_last_step
from quadriga.train.resume import saved_extra, saved_tensors
from quadriga.train.step import train_step


def run(run: Run, environ: Mapping[str, str]) -> int:
    """Train as `run` says, on this rank. Returns the exit code; faults are raised."""
    patience = run.config.checkpoint.timeout_seconds
    watchdog = Watchdog(run.config.comm, patience, Progress(), run.spec.folders.comm_traces, environ)
    with watchdog, witnessed(run, watchdog.progress) as witness:
        if run.config.checkpoint.enable and header.say_if_finished(run):
            return EXIT_OK
        trainer = build(run, environ, watchdog)
        witness.events, witness.last_step = trainer.events, lambda: trainer.state.step
        if run.config.checkpoint.create_seed_checkpoint:
            save(trainer, last=False)
            trainer.close()
            return EXIT_OK
        start = time.perf_counter()
        header.show(trainer)
        leave_served(trainer.loggers, run, trainer.backend, trainer.events.attempt, trainer.state.step + 1)
        tell(trainer, "ready")
        with trainer.wishes.heard():
            unreadable: Exception | None = None
            try:
                asked = train(trainer)
            except DataFault as fault:
                witness.common, unreadable = True, fault.error
            if unreadable is not None:
                save_last_whole_step(trainer)
                raise unreadable
            # Not in a `finally`: a rank that fails leaves at once. Waiting for others in a broken run may never end,
            # and an error made by closing would hide the first one. Every line and event is on disk when it is written.
            trainer.state.progress.at("leave")
            trainer.close()
            if asked is None:
                export_last_step(run, trainer.state.step)
            code = EXIT_OK if asked is None else leave(trainer, asked)
            reason = "finished" if asked is None else "asked to leave"
            tell(trainer, "end", code=code, reason=reason, **carried(trainer))
        trainer.watchdog.stop()
        if code == EXIT_OK:
            header.summarize(trainer, time.perf_counter() - start)
        process_group.stop()
        return code


def train(trainer: Trainer) -> int | None:
    """From the step that the state stands at to the last one, or to one after which all ranks agreed to leave: then
    what asked for it."""
    state, spec, asked = trainer.state, trainer.run.spec, None
    started_at = state.step
    gc.disable()  # collected when we choose, on all ranks at the same step: a straggler makes all wait
    with trainer.profiler:
        while state.step < spec.steps and asked is None:
            metrics = train_step(state, trainer.recipe, trainer.mesh)
            if state.step == started_at + 1:
                process_group.tighten_timeouts(trainer.run.config.comm)
                trainer.watchdog.first_step_is_done()
            state.progress.at("record")
            record = trainer.meter.record(metrics)
            trainer.write(record)
            trainer.checks.after_step(metrics, record)
            trainer.profiler.step(state.step)
            if trainer.failures.reason is not None:
                trainer.wishes.failed_to_write()
            agreed = trainer.wishes.exchange(trainer.checkpoints.minutes_have_passed())
            last = state.step == spec.steps
            asked = None if last else agreed.leave
            if agreed.leave == stop_requests.BY_LOST_FOLDER:
                raise lost_folder(trainer)
            if trainer.checkpoints.due(state.step, last, wanted=agreed.save or asked is not None):
                save(trainer, last)
            if trainer.validator and trainer.validator.is_due(state.step):
                validate(trainer)  # after the save: what ends a validation costs no step
            if state.step % trainer.run.config.training.gc_freq == 0:
                collect_garbage(trainer)
    return asked


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


def lost_folder(trainer: Trainer) -> CommonFault:
    """What all ranks raise when the run folder is gone, or another one has its name."""
    folder, state = trainer.run.spec.folders.dump, trainer.state
    return CommonFault(
        f"the run folder {folder} was removed or replaced in mid-run: stopped after step {state.step}\n"
        "nothing was written into what has its name now; saves that lie elsewhere are whole\n"
        "to do: find out who removed it; restore it from a copy to go on from its newest save, or begin anew"
    )


def leave(trainer: Trainer, asked: int) -> int:
    """The end of a run that was asked to leave; the exit code."""
    state, spec, section = trainer.state, trainer.run.spec, trainer.run.config.checkpoint
    tell(trainer, "signal", name=stop_requests.name_of(asked))
    trainer.wishes.left()
    if asked == stop_requests.BY_FAILED_WRITE and (not section.enable or section.load_only):
        raise failed_write(trainer, None)
    if not section.enable or section.load_only:
        return stop_requests.farewell(asked, state.step, spec.steps, None)
    path = trainer.checkpoints.on_first_rank(lambda: _saved_at(spec.folders.checkpoint, state.step))
    if asked == stop_requests.BY_FAILED_WRITE:
        raise failed_write(trainer, path)
    if path is None:
        what = f"asked to leave, but step {state.step} could not be saved (see above)"
        raise Fault(f"{what}: a start goes on from the save before")
    return stop_requests.farewell(asked, state.step, spec.steps, path)


def failed_write(trainer: Trainer, path: str | None) -> CommonFault:
    """What all ranks raise where `metrics.on_write_failure` says to stop; `path`: where the last step is saved."""
    reason = trainer.failures.reason or "another rank could not write its files"
    saved = f"saved in {path}" if path else "not saved"
    return CommonFault(
        f'{reason}, and metrics.on_write_failure is "stop"\n'
        f"stopped after step {trainer.state.step}, which is {saved}\n"
        "to do: make room or mend the folder, and start again; or train on without: --metrics.on_write_failure go_on"
    )


def _saved_at(folder: str, step: int) -> str | None:
    found = checkpoint_folder.find(folder, step)
    return None if found is None else found.path


def tell(trainer: Trainer, event: str, **facts: Any) -> None:
    """Add to the ledger what is told once for all ranks."""
    if trainer.events.rank == 0:
        trainer.events.tell(event, trainer.state.step, **facts)


def carried(trainer: Trainer) -> dict[str, Any]:
    """What our own collectives carried on this rank, where there are any: bytes by kind of call."""
    return {"carried": dict(trainer.for_shards.carried)} if trainer.for_shards and trainer.for_shards.carried else {}


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
    trainer.wishes.saved()


def collect_garbage(trainer: Trainer) -> None:
    """The young generations each time; everything, with a report, where `training.gc_debug` asks for it."""
    if trainer.run.config.training.gc_debug:
        logger.info("garbage: %d objects collected, %d tracked", gc.collect(), len(gc.get_objects()))
    else:
        gc.collect(1)
