"""The run: build, go on from where it stood, step until done, leave everything that a run should leave."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping

from quadriga.comm import process_group
from quadriga.config import Run
from quadriga.errors import EXIT_OK
from quadriga.log import logger
from quadriga.train import header
from quadriga.train.build import Trainer, build, saved_extra, saved_tensors
from quadriga.train.step import train_step


def run(run: Run, environ: Mapping[str, str]) -> int:
    """Train as `run` says, on this rank. Returns the exit code; faults are raised."""
    if run.config.checkpoint.enable and header.say_if_finished(run):
        return EXIT_OK
    trainer = build(run, environ)
    start = time.perf_counter()
    header.show(trainer)
    train(trainer)
    # Not in a `finally`: a rank that fails leaves at once. Waiting for others in a broken run may never end, and an
    # error made by closing would hide the first one. Every line and event is on disk when it is written.
    trainer.close()
    header.summarize(trainer, time.perf_counter() - start)
    process_group.stop()
    return EXIT_OK


def train(trainer: Trainer) -> None:
    """From the step that the state stands at to the last one."""
    state, spec = trainer.state, trainer.run.spec
    started_at = state.step
    gc.disable()  # collected when we choose, on all ranks at the same step: a straggler makes all wait
    with trainer.profiler:
        while state.step < spec.steps:
            metrics = train_step(state, trainer.recipe, trainer.mesh)
            if state.step == started_at + 1:
                process_group.tighten_timeouts(trainer.run.config.comm)
            trainer.write(trainer.meter.record(metrics))
            trainer.profiler.step(state.step)
            if trainer.validator and trainer.validator.is_due(state.step):
                validate(trainer)
            last = state.step == spec.steps
            if trainer.checkpoints.due(state.step, last):
                save(trainer, last)
            if state.step % trainer.run.config.training.gc_freq == 0:
                collect_garbage(trainer)


def validate(trainer: Trainer) -> None:
    assert trainer.validator is not None
    with trainer.meter.paused():
        start = time.perf_counter()
        loss, tokens = trainer.validator.mean_loss(trainer.state.parts, trainer.mesh)
        seconds = time.perf_counter() - start
    trainer.write(trainer.meter.validation(trainer.state.step, loss, tokens, seconds))


def save(trainer: Trainer, last: bool) -> None:
    with trainer.meter.paused():
        state = trainer.state
        trainer.checkpoints.save(state.step, saved_tensors(state), saved_extra(state), last=last)


def collect_garbage(trainer: Trainer) -> None:
    """The young generations each time; everything, with a report, where `training.gc_debug` asks for it."""
    if trainer.run.config.training.gc_debug:
        logger.info("garbage: %d objects collected, %d tracked", gc.collect(), len(gc.get_objects()))
    else:
        gc.collect(1)
