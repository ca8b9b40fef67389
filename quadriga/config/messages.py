"""Describes a resolved run as text: layout, batch, schedule, formats, recompute, checkpoints."""

from __future__ import annotations

from quadriga.config.read import Run
from quadriga.config.run_spec import RunSpec
from quadriga.config.schema import ActivationCheckpoint, Checkpoint, Compile, Training
from quadriga.hardware import TERA, Device
from quadriga.units import DTYPE_BYTES, format_bytes, format_count, plural

MOMENTS = 2  # per parameter, kept by Adam


def decimal_bytes(amount: float) -> str:
    """`96363134976` -> `96.4 GB (89.75 GiB)`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if amount >= unit:
            return f"{amount / unit:.3g} {name} ({format_bytes(amount)})"
    return format_bytes(amount)


def describe(run: Run, unit: str = "GPU") -> dict[str, str]:
    """What a run is, by name, for the dry run, the header of the log and the card. `unit`: as for `strategy`."""
    config, spec = run.config, run.spec
    return {
        "layout": strategy(spec, unit),
        "batch": batch(spec),
        **({"": reduction(spec)} if reduction(spec) else {}),
        "length": f"{plural(spec.steps, 'step')}, {format_count(spec.steps * spec.tokens_per_step)} tokens",
        "formats": formats(run),
        "recompute": recompute(config.activation_checkpoint),
    }


def reduction(spec: RunSpec) -> str:
    """When gradients are reduced, and why; empty if there is no choice."""
    if spec.micro_batches == 1 or spec.degrees.batch * spec.degrees.cp == 1:
        return ""
    when = "once per step" if spec.reduce_gradients == "once" else "after every micro-batch"
    return f"gradients are reduced {when}: {spec.reduce_reason}"


def strategy(spec: RunSpec, unit: str = "GPU") -> str:
    """The effective parallelism (`FSDP over 4 GPUs: ...`), one or more sentences for each kind.

    `unit` is the name of a rank: `GPU`, or `rank` if that is not known.
    """
    degrees = spec.degrees
    sentences = [_data_parallel(spec, unit)]
    if degrees.tp > 1:
        sentences.append(
            f"Tensor parallelism over {degrees.tp} {unit}s: each holds 1/{degrees.tp} of every large matrix and "
            "computes its slice of each product; between them, activations are sharded along the sequence."
        )
    if degrees.pp > 1:
        sentences.append(
            f"A pipeline over {degrees.pp} {unit}s: each holds a range of the layers and sends its activations on."
        )
    if degrees.cp > 1:
        sentences.append(f"Context parallelism over {degrees.cp} {unit}s: each holds 1/{degrees.cp} of every sequence.")
    return " ".join(sentences)


def _data_parallel(spec: RunSpec, unit: str) -> str:
    replicas, shards = spec.degrees.dp_replicate, spec.degrees.dp_shard
    freed = "frees them after use" if spec.reshard_after_forward else "keeps them until the backward pass ends"
    parts = "parameters, gradients and optimizer state"
    gathers = f"Each {unit} gathers a layer's parameters just before it needs them and {freed}"
    if replicas > 1 and shards > 1:
        return (
            f"HSDP over {replicas} x {shards} {unit}s: {replicas} copies of the model, each with its {parts} sharded "
            f"over {shards} {unit}s. {gathers}. Gradients are summed within a copy, then between the copies."
        )
    if shards > 1:
        return (
            f"FSDP over {shards} {unit}s: {parts} are sharded, one shard per {unit}. {gathers}. "
            f"Each {unit} reads its own rows of the batch."
        )
    if replicas > 1:
        return (
            f"DDP over {replicas} {unit}s: each holds the whole model and reads its own rows of the batch; "
            "gradients are summed before the update."
        )
    return f"One {unit} reads every row." if spec.world_size == 1 else f"All {unit}s compute on the same rows."


def batch(spec: RunSpec) -> str:
    """The arithmetic of one optimizer step."""
    factors = [plural(spec.degrees.batch, "data-parallel rank"), plural(spec.local_batch_size, "sequence")]
    if spec.accumulation_steps > 1:
        factors.append(plural(spec.accumulation_steps, "micro-batch").replace("micro-batchs", "micro-batches"))
    product = " x ".join(factors)
    sequences = plural(spec.global_batch_size, "sequence")
    return f"{product} = {sequences} of {spec.seq_len:,} tokens = {spec.tokens_per_step:,} tokens per step"


def schedule(run: Run) -> str:
    """The learning rate over the run, by phase: warm-up, plateau, decay. Empty phases are left out."""
    section, lr = run.config.lr_scheduler, run.config.optimizer.lr
    steps = section.phases(run.spec.steps)
    phases = [f"a linear warm-up of {plural(steps.warmup, 'step')} to {lr:g}" if steps.warmup else f"starts at {lr:g}"]
    if section.variant == "early_decay" and section.warmup_steps > steps.warmup:
        phases = [f"a linear warm-up to {lr:g}, cut off after {steps.warmup:,} of {section.warmup_steps:,} steps"]
    if steps.plateau:
        phases.append(f"{plural(steps.plateau, 'step')} at {lr:g}")
    if steps.decay:
        floor = f"{lr * section.min_lr_factor:g}" if section.min_lr_factor else "0"
        early = ", started one step early" if section.variant == "early_decay" else ""
        phases.append(f"a {section.decay_type} decay towards {floor} over {plural(steps.decay, 'step')}{early}")
    return ", then ".join(phases)


def formats(run: Run) -> str:
    training = run.config.training
    text = (
        f"parameters are held in {training.dtype}, the model computes in {training.mixed_precision_param}, "
        f"gradients are summed over ranks in {training.mixed_precision_reduce}"
    )
    if run.config.optimizer.state_dtype is not None:
        text += f", Adam's moments are held in {moments_dtype(run)}"
    if training.mixed_precision_param == "float32":
        text += f"; float32 matrix products at precision `{training.float32_matmul_precision}`"
    return text


def float32_cost(training: Training, device: Device | None) -> str:
    """What float32 at `highest` costs on a GPU, and the key to change; empty if the run computes otherwise, or if the
    device has no faster units. `device`: None if it is not in the table."""
    if not training.computes_in_full_float32:
        return ""
    what = "GPUs multiply matrices several times faster in bfloat16"
    if device is not None:
        if not (device.fp32 and device.bf16 and device.bf16 > device.fp32):
            return ""
        what = (
            f"{device.name} multiplies matrices at {device.fp32 / TERA:.4g} TFLOP/s, and in bfloat16 at "
            f"{device.bf16 / TERA:.4g} ({device.bf16 / device.fp32:.2g} times)"
        )
    return (
        f"the run computes in float32 at precision `highest`: {what}; "
        "`--training.mixed_precision_param bfloat16` uses this, and changes the numbers"
    )


def compilation(section: Compile) -> str:
    """What is compiled, and by what."""
    what = f"{', '.join(section.components)}; {section.backend}"
    if section.enable == "auto":
        return f"auto: on GPUs ({what}), off on a CPU"
    return f"on ({what})" if section.enable else "off"


def recompute(section: ActivationCheckpoint) -> str:
    if section.mode == "full":
        return "full: every block keeps only its input and recomputes the rest in the backward pass"
    if section.mode == "memory_budget":
        return f"memory budget: the compiler keeps {section.memory_budget:.0%} of the activation memory"
    if section.mode == "none":
        return "none: all activations are kept"
    if section.selective_ac_option == "op":
        return "selective (`op`): costly results such as matrix products are kept, cheap ones are recomputed"
    every = int(section.selective_ac_option) or 1
    which = "every block" if every == 1 else f"one of every {every} blocks"
    return f"selective ({section.selective_ac_option}): {which} is recomputed"


def moments_dtype(run: Run) -> str:
    return run.config.optimizer.state_dtype or run.config.training.dtype


def save_bytes(run: Run, parameters: int) -> float:
    """Bytes of one checkpoint with optimizer state, for `parameters` parameters."""
    return (DTYPE_BYTES[run.config.training.dtype] + MOMENTS * DTYPE_BYTES[moments_dtype(run)]) * parameters


def checkpoints(section: Checkpoint) -> str:
    if not section.enable:
        return "off"
    if section.load_only:
        return "loaded, never saved"
    kept = "all are kept" if section.keep_latest_k == 0 else f"the newest {section.keep_latest_k} are kept"
    minutes = f" and every {section.interval_minutes:g} minutes" if section.interval_minutes else ""
    last = "only the weights" if section.last_save_model_only else "everything that a resume needs"
    return f"on: every {plural(section.interval, 'step')}{minutes}, and at the end ({last}); {kept}"
