"""What a run would be, in a page: for `DRY_RUN=1`. Arithmetic only; no device is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quadriga.config import Run
from quadriga.config.run_spec import RunSpec
from quadriga.errors import Problem
from quadriga.models.registry import count_parameters
from quadriga.units import show_bytes, show_count

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM_MOMENTS = 2


def describe(run: Run, missing: Sequence[Problem] = ()) -> str:
    """The summary of a run. `missing`: what training would refuse it for, as things stand."""
    spec, model = run.spec, run.spec.model
    source = run.config.job.config_file or "the defaults"
    rows = [
        ("description", run.config.job.description),
        ("model", f"{_parameters(run)}: {model.n_layers} layers, {model.dim} wide, {_heads(spec)}"),
        ("tokenizer", f"{spec.tokenizer.path} ({_vocabulary(spec)})"),
        ("data", _data(run)),
        ("layout", layout_in_words(spec)),
        ("batch", batch_in_words(spec)),
        *_reduction(spec),
        ("length", f"{spec.steps:,} steps, {show_count(spec.steps * spec.tokens_per_step)} tokens"),
        ("formats", _formats(run)),
        ("backend", spec.backend or "nccl where CUDA is, else gloo"),
        ("memory", _memory(run)),
        ("", "(activations and buffers come on top; they are not estimated yet)"),
        ("checkpoint", _checkpoint(run)),
        ("run folder", spec.folders.dump),
    ]
    lines = [f"Dry run of {source}: {model.name} {model.flavor} on {_ranks(spec.world_size)}", ""]
    lines += [f"  {name:<12}{text}" for name, text in rows]
    missed = tuple(f"{problem.where} = " for problem in missing)
    notices = [notice for notice in spec.notices if not (missed and notice.startswith(missed))]
    if notices:
        lines += ["", "Notices", *(f"  - {notice}" for notice in notices)]
    if not missing:
        return "\n".join([*lines, "", "The configuration is ready to train."])
    lines += ["", "Not ready to train:", ""]
    return "\n".join([*lines, *("  " + line for problem in missing for line in str(problem).splitlines())])


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count:,} ranks"


def _parameters(run: Run) -> str:
    return f"{count_parameters(run.spec.model):,} parameters"


def _heads(spec: RunSpec) -> str:
    heads, shared = spec.model.n_heads, spec.model.n_kv_heads
    grouped = f" on {shared} key-value heads" if shared != heads else ""
    return f"{heads} heads{grouped}, vocabulary {spec.model.vocab_size:,}"


def _vocabulary(spec: RunSpec) -> str:
    facts = spec.tokenizer
    return facts.kind if facts.vocab_size is None else f"{facts.kind}, {facts.vocab_size:,} ids"


def _data(run: Run) -> str:
    training = run.config.training
    return f"{training.dataset} from {training.dataset_path}" if training.dataset_path else training.dataset


def layout_in_words(spec: RunSpec) -> str:
    """How the ranks share the work: `FSDP over 4 ranks: ...`."""
    degrees = spec.degrees
    parts = []
    if degrees.dp_replicate > 1 and degrees.dp_shard > 1:
        parts.append(f"HSDP, {degrees.dp_replicate} copies of the model, each sharded over {degrees.dp_shard} ranks")
    elif degrees.dp_shard > 1:
        parts.append(f"FSDP over {degrees.dp_shard} ranks: each holds 1/{degrees.dp_shard} of the model")
    elif degrees.dp_replicate > 1:
        parts.append(f"DDP over {degrees.dp_replicate} ranks: each holds the whole model")
    if degrees.tp > 1:
        parts.append(f"tensor parallel over {degrees.tp}")
    if degrees.pp > 1:
        parts.append(f"pipeline of {degrees.pp} stages' ranks")
    if degrees.cp > 1:
        parts.append(f"context parallel over {degrees.cp}")
    return "; ".join(parts) if parts else "one rank, nothing is shared"


def batch_in_words(spec: RunSpec) -> str:
    """The arithmetic of one optimizer step."""
    factors = [f"{spec.degrees.batch} data-parallel rank{'s' * (spec.degrees.batch != 1)}"]
    factors.append(f"{spec.local_batch_size} row{'s' * (spec.local_batch_size != 1)}")
    if spec.accumulation_steps > 1:
        factors.append(f"{spec.accumulation_steps} micro-batches")
    tokens = f"{spec.global_batch_size:,} rows of {spec.seq_len:,} = {spec.tokens_per_step:,} tokens a step"
    return f"{' x '.join(factors)} = {tokens}"


def _reduction(spec: RunSpec) -> list[tuple[str, str]]:
    if spec.accumulation_steps == 1 or spec.degrees.batch == 1:
        return []
    when = "once a step" if spec.reduce_gradients == "once" else "after every micro-batch"
    return [("", f"gradients are reduced {when}: {spec.reduce_reason}")]


def _formats(run: Run) -> str:
    training = run.config.training
    compute, reduce = training.mixed_precision_param, training.mixed_precision_reduce
    return f"parameters {training.dtype}, compute {compute}, gradients reduced in {reduce}"


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that one rank holds from step to step, if every cut is even."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def static_memory(run: Run) -> StaticMemory:
    """Parameters, gradients and Adam's two moments of one rank. Where accumulated gradients are reduced once a step,
    they are held unsharded and in float32 until then."""
    degrees, training = run.spec.degrees, run.config.training
    unsharded = count_parameters(run.spec.model) / (degrees.tp * degrees.pp)
    held = unsharded / (degrees.dp_shard * degrees.cp) * BYTES[training.dtype]
    whole_gradients = run.spec.accumulation_steps > 1 and run.spec.reduce_gradients == "once"
    gradients = max(held, unsharded * BYTES["float32"]) if whole_gradients else held
    return StaticMemory(held, gradients, ADAM_MOMENTS * held)


def _memory(run: Run) -> str:
    memory = static_memory(run)
    where = ", in host memory" if run.config.training.enable_cpu_offload else ""
    parts = f"parameters {show_bytes(memory.parameters)} + gradients {show_bytes(memory.gradients)}"
    parts += f" + Adam {show_bytes(memory.optimizer)} = {show_bytes(memory.total)}"
    return f"{parts} a rank{where}"


def checkpoint_bytes(run: Run) -> int:
    """One full save: parameters and Adam's two moments."""
    return count_parameters(run.spec.model) * (1 + ADAM_MOMENTS) * BYTES[run.config.training.dtype]


def _checkpoint(run: Run) -> str:
    section = run.config.checkpoint
    amount = checkpoint_bytes(run)
    size = f"one full save takes {amount / 1e9:,.1f} GB" if amount >= 1e9 else f"a save takes {amount / 1e6:,.0f} MB"
    if not section.enable:
        return f"off ({size})"
    return f"on, every {section.interval:,} steps and at the end, in {run.spec.folders.checkpoint}; {size}"
