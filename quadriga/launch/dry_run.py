"""The page that `DRY_RUN=1` prints: what a run would be. Arithmetic only; it needs no device."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from quadriga.checkpoint.folder import CheckpointError
from quadriga.config import Run, messages
from quadriga.config.messages import decimal_bytes
from quadriga.errors import EXIT_OK, EXIT_USAGE, Problem
from quadriga.hardware import device_named
from quadriga.planning.advice import advice_for
from quadriga.planning.communication import format_backend_by_axis
from quadriga.planning.estimate import Estimate, estimate
from quadriga.planning.report import estimate_rows as estimated_rows
from quadriga.units import plural

NAME_WIDTH, TEXT_WIDTH = 13, 104


@dataclass(frozen=True)
class StartCheck:
    """Whether a run would start.

    `problems` are the reasons for a refusal. `fault`: checkpoints exist, and none is good. Otherwise `start` says from
    where the run would begin; None if it only rehearses.
    """

    problems: tuple[Problem, ...] = ()
    fault: CheckpointError | None = None
    start: str | None = None

    @property
    def code(self) -> int:
        """The exit code of such a start, as far as it can be predicted."""
        return EXIT_USAGE if self.problems else self.fault.exit_code if self.fault else EXIT_OK


def format_dry_run(run: Run, start_check: StartCheck, ports: str = "") -> str:
    """The summary of a run, and whether it would start now. `ports`: where its ranks listen."""
    missing = start_check.problems
    if name := run.config.estimate.device:
        run = run.on_device("cpu" if device_named(name, "estimate.device").name == "CPU" else "cuda")
    model, source = run.spec.model, run.config.job.config_file or "the defaults"
    predicted = predict(run)
    lines = [f"Dry run of {source}: {model.name} {model.flavor} on {plural(run.spec.world_size, 'rank')}", ""]
    rows = (*_rows(run, start_check), *([("ports", ports)] if ports else []), *estimated_rows(predicted))
    lines += [line for name, text in rows for line in _wrapped(name, text)]
    if advice := advice_for(predicted):
        helps = "would be faster" if fits_in_memory(predicted) else "would help"
        lines += ["", f"What {helps}:", *(f"  - {each}" for each in advice)]
    reported = tuple(f"{problem.where} = " for problem in missing)
    cost = messages.float32_cost(run.config.training, predicted.device) if predicted.device else ""
    every = (*run.spec.notices, *filter(None, [cost]))
    notices = [notice for notice in every if not (reported and notice.startswith(reported))]
    if notices:
        lines += ["", "Notices:", *(f"  - {notice}" for notice in notices)]
    if missing or start_check.fault:
        lines += ["", "Before it can train:", ""]
        lines += ["  " + line for each in (*missing, start_check.fault) if each for line in str(each).splitlines()]
    else:
        lines += ["", "Ready to be rehearsed." if run.config.only_rehearses else "Ready to train."]
    return "\n".join(lines)


def predict(run: Run) -> Estimate:
    """The estimate, on the device of `estimate.device` if that is set."""
    name = run.config.estimate.device
    return estimate(run, device_named(name, "estimate.device") if name else None)


def fits_in_memory(predicted: Estimate) -> bool:
    verdict = predicted.memory_fit()
    return verdict is not None and verdict.fits


def _wrapped(name: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"  {name:<{NAME_WIDTH}}{first}", *(" " * (NAME_WIDTH + 2) + line for line in rest)]


def _rows(run: Run, start_check: StartCheck) -> Iterator[tuple[str, str]]:
    from quadriga.data.data_check import describe_data, describe_validation

    config, spec, model = run.config, run.spec, run.spec.model
    heads = f"{model.n_heads} heads" + f" ({model.n_kv_heads} for keys and values)" * (
        model.n_kv_heads != model.n_heads
    )
    shape = f"{model.n_layers} layers, {model.dim:,} wide, {heads}, vocabulary {model.vocab_size:,}"
    facts, training = spec.tokenizer, config.training
    known = facts.kind if facts.vocab_size is None else f"{facts.kind}, {facts.vocab_size:,} ids"
    yield "description", config.job.description
    yield "model", f"{model.n_parameters:,} parameters: {shape}"
    yield "tokenizer", "none: the data are token ids" if facts.kind == "none" else f"{facts.path} ({known})"
    data, *sources = describe_data(training, spec)
    yield "data", data
    for source in sources:
        yield "", source
    yield from messages.describe(run).items()
    for number, line in enumerate(describe_validation(training, config.validation, spec)):
        yield "" if number else "validation", line
    yield "compile", messages.compilation(config.compile)
    yield "backends", format_backend_by_axis(run, spec.backend) if spec.backend else "nccl with CUDA, else gloo"
    size = decimal_bytes(messages.save_bytes(run, model.n_parameters))
    yield "checkpoints", f"{messages.checkpoints(config.checkpoint)}; one full save takes about {size}"
    if start_check.start is not None:
        yield "starts at", start_check.start
    yield "run folder", spec.folders.dump
