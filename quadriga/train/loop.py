"""The run: build, resume, train until the last step or a stop request, write the final files."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import torch

from quadriga.checkpoint import folder as checkpoint_folder
from quadriga.comm import process_group
from quadriga.config import Run
from quadriga.data.tokenizer import SpecialIds, build_tokenizer
from quadriga.data.tokenizer_export import transformers_files
from quadriga.errors import EXIT_OK, Fault
from quadriga.log import logger
from quadriga.metrics.jsonl import Record
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.models import registry
from quadriga.resilience import stop_requests
from quadriga.resilience.bad_steps import CommonFault
from quadriga.resilience.failures import record_failure
from quadriga.resilience.progress import Progress
from quadriga.resilience.watchdog import Watchdog
from quadriga.train import header
from quadriga.train.backends import write_backends_record
from quadriga.train.build import TrainerParts, build_trainer
from quadriga.train.feed import DataFault
from quadriga.train.resume import saved_extra, saved_tensors
from quadriga.train.step import train_step
from quadriga.units import format_seconds


def run(run: Run, environ: Mapping[str, str]) -> int:
    """Train on this rank with the configuration `run`. Returns the exit code; faults are raised."""
    patience = run.config.checkpoint.timeout_seconds
    watchdog = Watchdog(run.config.comm, patience, Progress(), run.spec.folders.comm_traces, environ)
    with watchdog, record_failure(run, watchdog.progress) as context:
        if run.config.checkpoint.enable and header.log_if_finished(run):
            return EXIT_OK
        trainer = build_trainer(run, environ, watchdog)
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
            # Not in a `finally`: a rank that fails exits at once. A wait for other ranks in a broken run may never end,
            # and an error in `close` would hide the first one. Records and events are written to disk immediately.
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


def train(trainer: TrainerParts) -> int | None:
    """Train from the current step to the last one, or until all ranks agree on a stop request. Returns the cause of
    the stop, None after the last step."""
    state, spec, stop_cause = trainer.state, trainer.run.spec, None
    started_at = state.step
    if trainer.run.config.compile.enable:
        logger.info("compiling in step %d, which takes longer", started_at + 1)
    gc.disable()  # collected explicitly, on all ranks at the same step, because one slow rank delays all
    with trainer.profiler:
        while state.step < spec.steps and stop_cause is None:
            metrics = train_step(state, trainer.step_config, trainer.mesh)
            stop_cause = after_step(trainer, metrics, started_at)
    return stop_cause


def after_step(trainer: TrainerParts, metrics: StepMetrics, started_at: int) -> int | None:
    """What follows a step: records, checks, and the saves and validations that are due. `started_at`: the step that
    this start resumed from. Returns the cause of a stop on request."""
    state, spec = trainer.state, trainer.run.spec
    if state.step == started_at + 1:
        process_group.tighten_timeouts(trainer.run.config.comm)
        trainer.watchdog.first_step_done()
    state.progress.enter_phase("record")
    record = trainer.meter.record(metrics)
    write_record(trainer, record)
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
        validate_on_schedule(trainer)  # after the save, so that a failed validation costs no step
    if state.step % trainer.run.config.training.gc_freq == 0:
        collect_garbage(trainer)
    return stop_cause


def write_record(trainer: TrainerParts, record: Record | None) -> None:
    """Give a record to every logger; None, between logging steps, to none."""
    if record is not None:
        trainer.last_record = record if record["kind"] == "train" else trainer.last_record
        for writer in trainer.loggers:
            writer.write(record)


def save_last_whole_step(trainer: TrainerParts) -> None:
    """Save the last complete step before a run with unreadable data ends. Call on all ranks. Logs faults of the save
    instead of raising them, because they would hide the data error."""
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
        logger.info("the data cannot be read; step %d is saved in %s: a start resumes from there", state.step, path)


def lost_folder_fault(trainer: TrainerParts) -> CommonFault:
    """The fault that all ranks raise if the run folder is gone, or another one has its name."""
    folder, state = trainer.run.spec.folders.dump, trainer.state
    return CommonFault(
        f"the run folder {folder} was removed or replaced during the run: stopped after step {state.step}\n"
        "nothing was written into a folder that replaced it; checkpoints in other folders are complete\n"
        "to do: find out who removed it; restore it from a copy to resume from its newest checkpoint, or start anew"
    )


def finish_on_request(trainer: TrainerParts, stop_cause: int) -> int:
    """End a run that was asked to stop. Returns the exit code; faults are raised."""
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
        what = f"asked to stop, but step {state.step} could not be saved (see above)"
        raise Fault(f"{what}: a start resumes from the checkpoint before")
    return stop_requests.log_exit(stop_cause, state.step, spec.steps, path)


def write_failure_fault(trainer: TrainerParts, path: str | None) -> CommonFault:
    """The fault that all ranks raise if `metrics.on_write_failure` is "stop". `path`: checkpoint of the last step."""
    reason = trainer.failures.reason or "another rank could not write its files"
    saved = f"saved in {path}" if path else "not saved"
    return CommonFault(
        f'{reason}, and metrics.on_write_failure is "stop"\n'
        f"stopped after step {trainer.state.step}, which is {saved}\n"
        "to do: free disk space or repair the folder, and start again; or --metrics.on_write_failure go_on"
    )


def _saved_at(folder: str, step: int) -> str | None:
    found = checkpoint_folder.find_complete(folder, step)
    return None if found is None else found.path


def log_event(trainer: TrainerParts, event: str, **facts: Any) -> None:
    """Add an event to the log on the first rank, once for all ranks."""
    if trainer.events.rank == 0:
        trainer.events.log_event(event, trainer.state.step, **facts)


def bytes_by_collective(trainer: TrainerParts) -> dict[str, Any]:
    """Bytes by kind of call that Quadriga's own collectives carried on this rank; empty if it uses none."""
    return (
        {"carried": dict(trainer.shard_collectives.bytes_by_collective)}
        if trainer.shard_collectives and trainer.shard_collectives.bytes_by_collective
        else {}
    )


def validate_on_schedule(trainer: TrainerParts) -> None:
    """Validate. Warn once if this takes much of the time between two validations."""
    start = time.perf_counter()
    validate(trainer)
    costly = trainer.validation_cost.check(start, time.perf_counter())
    if costly is not None and trainer.events.rank == 0:
        seconds, between = costly
        logger.warning(
            "a validation takes %.3g s, %.0f %% of the %.3g s since the one before: raise validation.freq, or lower "
            "validation.windows",
            seconds,
            100 * seconds / between,
            between,
        )
        log_event(trainer, "slow_validation", seconds=seconds, between=between)


def validate(trainer: TrainerParts) -> None:
    """Compute and record the loss of each held-out set."""
    validator, state = trainer.validator, trainer.state
    assert validator is not None
    for held_out in validator.sets:
        with trainer.meter.paused(), state.progress.within("validate"):
            start = time.perf_counter()
            found = validator.mean_loss(held_out, state.parts, trainer.mesh)
            seconds = time.perf_counter() - start
        write_record(trainer, trainer.meter.validation(state.step, found.loss, found.tokens, seconds, held_out.label))
        if notice := validator.rest_notice(held_out, found):
            logger.info("notice: %s", notice)


def save(trainer: TrainerParts, last: bool) -> None:
    trainer.checks.before_save()
    with trainer.meter.paused(), trainer.state.progress.within("save"):
        state = trainer.state
        trainer.checkpoints.save(state.step, saved_tensors(state), saved_extra(trainer.run, state), last=last)
    trainer.stop_requests.mark_saved()


def export_last_step(run: Run, step: int) -> None:
    """With `checkpoint.last_save_in_hf`, write `step-N-hf` next to `step-N`, which must be published. Call on all
    ranks. Raises CheckpointError on every rank if it cannot be written; `step-N` is then still complete."""
    section = run.config.checkpoint
    if not (section.enable and section.last_save_in_hf) or section.load_only:
        return
    from quadriga.checkpoint.hf_export import export_hf

    start, path = time.monotonic(), checkpoint_folder.published_path(run.spec.folders.checkpoint, step)
    found = checkpoint_folder.read_checkpoint(path)
    model, (bos_id, eos_id), files = run.spec.model, *exported_tokenizer(run)
    positions = max(found.extra.get("max_positions", 0), run.spec.seq_len)
    config = registry.hf_config(model, bos_id=bos_id, eos_id=eos_id, positions=positions)
    dtype = getattr(torch, section.export_dtype)
    out, group = f"{found.path}-hf", process_group.host_group(section.timeout_seconds)
    export_hf(found, out, registry.tensor_names(model), config, group, dtype=dtype, tokenizer=files, replace=True)
    logger.info("saved %s in %s", out, format_seconds(time.monotonic() - start))


def exported_tokenizer(run: Run) -> tuple[SpecialIds, dict[str, bytes]]:
    """BOS and EOS, and the files of the tokenizer. Without one, EOS is what ends a document of the token files."""
    if run.spec.tokenizer.kind == "none":
        return SpecialIds(None, run.config.training.end_of_document), {}
    assets = run.config.model.hf_assets_path
    return build_tokenizer(assets).special_ids, transformers_files(assets)


def collect_garbage(trainer: TrainerParts) -> None:
    """Collect the young generations; with `training.gc_debug` all of them, and log the counts."""
    if trainer.run.config.training.gc_debug:
        logger.info("garbage: %d objects collected, %d tracked", gc.collect(), len(gc.get_objects()))
    else:
        gc.collect(1)
