"""The header before the first step of a run, and the summary after its last."""

from __future__ import annotations

import sys
from pathlib import Path

import quadriga
from quadriga.checkpoint import titan
from quadriga.comm import collectives
from quadriga.config import Run, messages, to_toml
from quadriga.data.mixture_loader import MixtureLoader
from quadriga.data.token_loader import TokenLoader
from quadriga.errors import printable
from quadriga.log import logger
from quadriga.planning.communication import format_backend_by_axis
from quadriga.terminal import discard_output
from quadriga.train.build import TrainerParts
from quadriga.train.numerics import known_gpu
from quadriga.units import format_count, format_seconds


def log_header(trainer: TrainerParts) -> None:
    """Log the header: model, data, ranks, backends, layout, batch, length, formats and run folder."""
    run, spec, state = trainer.run, trainer.run.spec, trainer.state
    cost = (
        messages.float32_cost(run.config.training, known_gpu(trainer.device)) if trainer.device.type == "cuda" else ""
    )
    for notice in (*spec.notices, *filter(None, [cost])):
        logger.info("notice: %s", notice)
    logger.info("quadriga %s: %s", quadriga.__version__, run.config.job.description)
    for name, text in header_rows(trainer):
        logger.info("  %-10s %s", name, text)
    if state.step:
        logger.info("resumed: step %d of %d is done (attempt %d)", state.step, spec.steps, state.attempt)
    if run.config.job.print_config:
        logger.info("\n%s", to_toml(run.config))


def header_rows(trainer: TrainerParts) -> list[tuple[str, str]]:
    config, spec, model = trainer.run.config, trainer.run.spec, trainer.run.spec.model
    parameters = format_count(model.n_parameters)
    shape = (
        f"{model.n_layers} layers, {model.dim:,} wide, {model.n_heads} heads ({model.n_kv_heads} for keys and values)"
    )
    data = config.training.dataset + (f" at {config.training.dataset_path}" if config.training.dataset_path else "")
    sources: list[str] = []
    if isinstance(loader := trainer.state.loader, TokenLoader):
        data += f": {loader.describe(spec.steps * spec.global_batch_size)}"
    elif isinstance(loader, MixtureLoader):
        data, *sources = loader.describe(spec.steps)
    tokenizer = "" if spec.tokenizer.kind == "none" else f", tokenizer {config.model.hf_assets_path}"
    return [
        ("model", f"{model.name} {model.flavor}: {parameters} parameters, {shape}, vocabulary {model.vocab_size:,}"),
        ("data", f"{data}{tokenizer}"),
        *(("", source) for source in sources),
        ("ranks", f"{spec.world_size} on {trainer.device.type}, communication over {trainer.backend}"),
        ("backends", format_backend_by_axis(trainer.run, trainer.backend)),
        *messages.describe(trainer.run, "GPU" if trainer.device.type == "cuda" else "rank").items(),
        ("compile", messages.compilation(config.compile)),
        ("run folder", spec.folders.dump),
    ]


def log_if_finished(run: Run) -> bool:
    """Whether the newest checkpoint is of the last step already. If so, log it, and how to extend the run."""
    section, spec = run.config.checkpoint, run.spec
    found = titan.find_newest(spec.folders.checkpoint, section.load_step, least=spec.steps)  # on every rank
    if found is None or found.step < spec.steps:
        return False
    logger.info("this run is finished: %s is step %d of %d", found.path, found.step, spec.steps)
    logger.info("to extend it:         add --training.steps %d", 2 * found.step)
    logger.info("to start another one: add --job.dump_folder FOLDER, or remove %s", spec.folders.dump)
    return True


def print_summary(trainer: TrainerParts, seconds: float) -> None:
    """Print the result of a run and the paths of its files to standard output, on rank 0."""
    if collectives.rank() != 0:
        return
    spec, config, state = trainer.run.spec, trainer.run.config, trainer.state
    last = trainer.last_record
    took, tokens = format_seconds(seconds), format_count(state.tokens_seen)
    loss = f", loss {last['loss']:.4f}" if last else ""
    result = f"\nfinished: {state.step:,} steps, {tokens} tokens in {took}{loss}"
    places = [("metrics", str(Path(spec.folders.dump, "metrics.jsonl")))]
    if config.metrics.enable_tensorboard:
        places.append(("curves", f"tensorboard --logdir {spec.folders.tensorboard}"))
    if config.profiling.enable_profiling:
        places.append(("traces", f"{spec.folders.traces}/iteration_N/rankK_trace.json.gz"))
    if config.checkpoint.enable and not config.checkpoint.load_only:
        places.append(("checkpoint", f"{spec.folders.checkpoint}/step-{state.step}"))
    lines = [result, *(f"  {name:<10} {printable(place)}" for name, place in places)]
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:  # the run itself is done
        logger.warning("the summary cannot be written to the standard output: %s", error.strerror)
        discard_output(sys.stdout)
