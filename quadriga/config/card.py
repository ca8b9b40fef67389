"""The card of a configuration: a README.md, generated from the resolved run, so every statement in it is true.

The first line is the command that generates the card again. `--check` reads it.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

from quadriga.config import messages
from quadriga.config.card_help import MEANINGS, assets_help, backend_help, memory_help
from quadriga.config.keys import format_toml
from quadriga.config.markdown import argument, code, plain, table
from quadriga.config.messages import decimal_bytes, plural
from quadriga.config.read import Run
from quadriga.config.variables import VARIABLES
from quadriga.hardware import Device
from quadriga.units import format_count, format_seconds

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class CardFigures:
    """Figures from arithmetic: parameters, FLOPs of one token (forward and backward), and rows of the estimate.

    `estimated`: (what, for one rank). `devices`: (device, memory, needed, verdict, step time).
    """

    parameters: int
    flops_per_token: float
    estimated: tuple[tuple[str, str], ...] = ()
    devices: tuple[tuple[str, str, str, str, str], ...] = ()


@dataclass(frozen=True)
class CardTarget:
    """The target of a card: the TOML file relative to the repository's root, the number of GPUs, the device."""

    file: str
    gpus: int
    device: str | None = None

    @property
    def unit(self) -> str:
        """The name of a rank in the text: `GPU`, or `rank` if the card is made for the CPU."""
        return "rank" if (self.device or "").lower() == "cpu" else "GPU"

    @property
    def header(self) -> str:
        device = f" --device {shlex.quote(self.device)}" if self.device else ""
        return f"<!-- quadriga card {shlex.quote(self.file)} --ngpu {self.gpus}{device} -->"


def read_target(card: str) -> CardTarget | None:
    """The target in the first line of a card; None if there is none."""
    found = re.match(r"<!-- quadriga card (.+) -->\n", card)
    try:
        arguments = shlex.split(found[1]) if found else []
    except ValueError:  # an open quotation mark
        return None
    match arguments:
        case [file, "--ngpu", gpus, *rest] if re.fullmatch(r"[1-9][0-9]{0,8}", gpus):
            if not rest or (len(rest) == 2 and rest[0] == "--device"):
                return CardTarget(file, int(gpus), rest[1] if rest else None)
    return None


def render_card(run: Run, target: CardTarget, figures: CardFigures, device: Device | None) -> str:
    """The card as Markdown. `run` must be resolved for `target.gpus` ranks; `device` is that of `target.device`."""
    sections = [
        f"{target.header}\n<!-- Generated from the TOML file; change that, and run the command above. -->",
        f"# {plain(run.config.job.description)}",
        _lead(run, figures, target.unit),
        "## Overview",
        _at_a_glance(run, figures, target.unit),
        "## How to run it",
        _how_to_run(run, target),
        "## Parallelism",
        _parallelism(run, target.unit),
        "## Model and data",
        _model_and_data(run, figures),
        "## Hyper-parameters",
        _hyper_parameters(run),
        "## Memory and formats",
        _memory(run, figures, target.unit),
        "## Output",
        _outputs(run, figures),
        "## Monitoring",
        _monitor(run),
        "## Checks",
        _validate(run, target),
        "## Troubleshooting",
        _troubleshooting(run),
        "## Environment variables",
        table(("variable", "if unset", "meaning"), [(code(name), *texts) for name, *texts in VARIABLES]),
        "## Hardware",
        _hardware(run, figures, device),
        "## Keys that the file sets",
        _keys(run),
    ]
    return "\n\n".join(sections) + "\n"


def _lead(run: Run, figures: CardFigures, unit: str) -> str:
    spec = run.spec
    tokens = format_count(spec.steps * spec.tokens_per_step)
    return (
        f"Trains **{spec.model.name} {spec.model.flavor}** ({figures.parameters:,} parameters) from initial weights on "
        f"{code(run.config.training.dataset)} for {plural(spec.steps, 'step')} ({tokens} tokens) "
        f"on **{plural(spec.world_size, unit)}**.\n\n> {messages.strategy(spec, unit)}"
    )


def _at_a_glance(run: Run, figures: CardFigures, unit: str) -> str:
    config, spec, described = run.config, run.spec, messages.describe(run, unit)
    compile = config.compile
    compiled = f"on ({', '.join(compile.components)}; {plain(compile.backend)})" if compile.enable else "off"
    profiling = config.profiling
    traces = f"on, {profiling.profiler_active} steps of every {profiling.profile_freq}"
    rows = [
        (f"total {unit}s", f"{spec.world_size:,}"),
        ("model", f"{spec.model.name} {spec.model.flavor}, {format_count(figures.parameters)} parameters"),
        ("tokenizer", code(spec.tokenizer.path if spec.tokenizer.kind == "bytes" else config.model.hf_assets_path)),
        ("data", _data(run)),
        *((name, described[name]) for name in ("batch", "length")),
        ("optimizer", f"{config.optimizer.name}, peak learning rate {config.optimizer.lr:g}"),
        *((name, described[name]) for name in ("formats", "recompute")),
        ("compile", compiled),
        ("profiling", traces if profiling.enable_profiling else "off"),
        ("checkpoints", messages.checkpoints(config.checkpoint)),
        ("run folder", f"{code(spec.folders.dump)}"),
    ]
    return table(("what", "value"), rows)


def _data(run: Run) -> str:
    training = run.config.training
    place = {"builtin": ", the Python standard library's text", "c4": ", streamed from the Hugging Face Hub"}
    where = f" from {code(training.dataset_path)}" if training.dataset_path else place.get(training.dataset, "")
    return f"{code(training.dataset)}{where}"


def _how_to_run(run: Run, target: CardTarget) -> str:
    file, gpus = f"./{target.file}", run.spec.world_size
    needs_files = run.config.model.hf_assets_path != "builtin:bytes"
    fetch = "python scripts/download_hf_assets.py          # the tokenizer, once; accept its licence on the Hub first\n"
    machines = -(-gpus // GPUS_PER_MACHINE)
    if machines == 1:
        script = f"CONFIG_FILE={argument(file)} NGPU={gpus} ./run_train.sh"
        direct = f"torchrun --nproc_per_node={gpus} torchtitan/train.py --job.config_file {shlex.quote(file)}"
        several = ""
    else:
        here = gpus // machines
        script = (
            f"NNODES={machines} NODE_RANK=0 RDZV_ENDPOINT=node0:29500 NGPU={here} "
            f"CONFIG_FILE={argument(file)} ./run_train.sh"
        )
        direct = (
            f"torchrun --nnodes={machines} --node_rank=0 --rdzv_backend=static --rdzv_endpoint=node0:29500 "
            f"--nproc_per_node={here} torchtitan/train.py --job.config_file {shlex.quote(file)}"
        )
        several = (
            f"\n\nStart this on each of the {machines} machines with {here} GPUs. NODE_RANK is 0 to {machines - 1}. "
            f"RDZV_ENDPOINT is the first machine (`node0` in this example) and a free port on it."
        )
    return (
        "From the repository's root:\n\n```bash\npip install -r requirements.txt\n"
        + (fetch if needs_files else "")
        + "\n# dry run: checks everything, starts nothing, needs no GPU\n"
        f"DRY_RUN=1 NGPU={gpus} CONFIG_FILE={argument(file)} ./run_train.sh\n"
        f"\n# with the script\n{script}\n\n# without it\n{direct}\n```{several}\n\n"
        "You can override every key on the command line: `--training.steps 20`, `--metrics.no_enable_tensorboard`. "
        "Paths are relative to the directory that the run is started from."
    )


def _parallelism(run: Run, unit: str) -> str:
    degrees = run.spec.degrees
    sizes = [degrees.dp_replicate, degrees.dp_shard, degrees.tp, degrees.pp, degrees.cp]
    rows = [
        (f"`{name}`", f"**{size}**" if size > 1 else "1", meaning.replace("GPUs", f"{unit}s"))
        for (name, meaning), size in zip(MEANINGS, sizes, strict=True)
    ]
    product = " x ".join(str(size) for size in sizes)
    reduced = f" G{text[1:]}." if (text := messages.reduction(run.spec)) else ""
    each = "one per GPU" if unit == "GPU" else "each a process on the CPU, or one per GPU"
    return (
        f"{table(('degree', 'here', 'meaning'), rows)}\n\n"
        f"{product} = {plural(run.spec.world_size, 'rank')}, {each}.{_other_numbers(run)}{reduced}"
    )


def _other_numbers(run: Run) -> str:
    """The other numbers of ranks on which the file runs."""
    training, degrees = run.config.training, run.spec.degrees
    if run.config.parallelism.data_parallel_shard_degree != -1:
        return ""
    free = " `data_parallel_shard_degree = -1` takes all ranks that remain"
    others = run.spec.world_size // degrees.dp_shard
    if training.global_batch_size == -1:
        return f"{free}, so the file runs on any number of ranks{f' that {others} divides' if others > 1 else ''}."
    rows = training.global_batch_size // training.local_batch_size // degrees.dp_replicate
    fits = [others * shard for shard in range(1, rows + 1) if rows % shard == 0]
    return f"{free}; the global batch of {training.global_batch_size} allows {', '.join(map(str, fits))} ranks."


def _model_and_data(run: Run, figures: CardFigures) -> str:
    model, training = run.spec.model, run.config.training
    heads = f"{model.n_heads}, {model.n_kv_heads} for keys and values, each {model.head_dim} wide"
    scaling = f", scaling factor {model.rope_scaling.factor:g}" if model.rope_scaling else ""
    rows = [
        ("parameters", f"{figures.parameters:,}"),
        ("blocks", f"{model.n_layers}"),
        ("width", f"{model.dim:,}; feed-forward {model.ffn_dim:,}"),
        ("attention heads", heads),
        ("vocabulary", f"{model.vocab_size:,}" + (", shared by embedding and output" if model.tie_embeddings else "")),
        ("positions", f"rotary, base {model.rope_theta:,.0f}{scaling}"),
        ("data", _data(run)),
        ("sequence", f"{training.seq_len:,} tokens; documents are concatenated, each between BOS and EOS"),
        ("work", f"{figures.flops_per_token:.3g} FLOPs per token, forward and backward, with causal attention"),
    ]
    return table(("what", "value"), rows)


def _hyper_parameters(run: Run) -> str:
    optimizer, training = run.config.optimizer, run.config.training
    decayed = "all parameters" if optimizer.decay_norms_and_biases else "matrices only"
    rows = [
        ("optimizer", f"{optimizer.name} ({optimizer.implementation})"),
        ("learning rate", messages.schedule(run)),
        ("betas, eps", f"{optimizer.beta1:g}, {optimizer.beta2:g}, {optimizer.eps:g}"),
        ("weight decay", f"{optimizer.weight_decay:g}, on {decayed}"),
        ("clipping", f"global norm {training.max_norm:g}" if training.max_norm else "off"),
        ("batch", messages.batch(run.spec)),
        ("steps", f"{run.spec.steps:,}"),
        ("seed", f"{run.spec.seed}"),
    ]
    return table(("what", "value"), rows)


def _memory(run: Run, figures: CardFigures, unit: str) -> str:
    facts = [
        f"- Formats: {messages.formats(run)}. The same holds on every layout, one rank included.",
        f"- Recompute: {messages.recompute(run.config.activation_checkpoint)}.",
        f"- CPU offload: {'on' if run.config.training.enable_cpu_offload else 'off'}.",
        f"- Compile: {'on' if run.config.compile.enable else 'off'}.",
    ]
    estimated = table(("estimated", f"for one {unit}"), figures.estimated)
    devices = table(("device", "memory", "needed", "verdict", "step time (uncalibrated)"), figures.devices)
    return (
        "\n".join(facts)
        + "\n\nThe estimate of `quadriga estimate`, from arithmetic, without a GPU (docs/estimates.md explains it and "
        f"its accuracy):\n\n{estimated}\n\nOn {plural(run.spec.world_size, 'device')} of each kind:\n\n"
        f"{devices}"
    )


def _outputs(run: Run, figures: CardFigures) -> str:
    config, folders = run.config, run.spec.folders
    profiling, metrics = config.profiling, config.metrics
    traces = f"{profiling.profiler_active} steps of every {profiling.profile_freq}, one file per rank"
    size = decimal_bytes(messages.save_bytes(run, figures.parameters))
    saves = messages.checkpoints(config.checkpoint)
    takes = "takes" if config.checkpoint.enable else "would take"
    snapshots = profiling.enable_memory_snapshot
    rows = [
        (code(f"{folders.dump}/config.toml"), "always", "the resolved configuration"),
        (code(f"{folders.dump}/environment.json"), "always", "versions, devices, git commit"),
        (code(f"{folders.dump}/metrics.jsonl"), "always", "every logged step in full precision"),
        (code(f"{folders.tensorboard}/"), _on(metrics.enable_tensorboard), "TensorBoard curves"),
        (code(f"{folders.traces}/iteration_N/rankK_trace.json.gz"), _on(profiling.enable_profiling), traces),
        (code(f"{folders.memory_snapshots}/"), _on(snapshots), "history of the CUDA allocator"),
        (
            code(f"{folders.checkpoint}/step-N/"),
            _on(config.checkpoint.enable),
            f"{saves}; one full save {takes} about {size}",
        ),
    ]
    return table(("file", "here", "content"), rows) + "\n\n(N is a step, K a rank.)"


def _on(switch: bool) -> str:
    return "on" if switch else "off"


def _monitor(run: Run) -> str:
    folders, metrics = run.spec.folders, run.config.metrics
    lines = [
        f"- On the console: one line every {plural(metrics.log_freq, 'step')} from the ranks in LOG_RANK, with loss, "
        "gradient norm before clipping, memory, tokens per second, wait for data, and time left.",
        "- " + code(f"tail -f {folders.dump}/metrics.jsonl"),
    ]
    if metrics.enable_tensorboard:
        lines.append("- " + code(f"tensorboard --logdir {folders.tensorboard}"))
    if metrics.enable_wandb:
        lines.append("- Weights & Biases: WANDB_PROJECT names the project.")
    if run.config.profiling.enable_profiling:
        lines.append("- Traces: open a file of " + code(f"{folders.traces}/") + " in https://ui.perfetto.dev.")
    return "\n".join(lines)


def _validate(run: Run, target: CardTarget) -> str:
    validation, training = run.config.validation, run.config.training
    dry_run = f"DRY_RUN=1 NGPU={target.gpus} CONFIG_FILE={shlex.quote(f'./{target.file}')} ./run_train.sh"
    held_out = f"validation on {code(validation.dataset)} at step 1 and every {plural(validation.freq, 'step')}"
    if not validation.enable:
        dataset = "c4_validation" if training.dataset == "c4" else "builtin_validation"
        held_out = (
            f"off; `--validation.enable --validation.dataset {dataset} "
            f"--validation.seq_len {training.seq_len} --validation.local_batch_size {training.local_batch_size} "
            "--validation.steps 20` enables it"
        )
    return (
        f"- The configuration: {code(dry_run)} checks it and reports all problems at once.\n"
        f"- This card: {code(f'quadriga card {shlex.quote(target.file)} --check')} fails if it is out of date.\n"
        f"- The loss on held-out text: {held_out}.\n"
        f"- A short run: `--training.steps 20` ends after 20 steps; the first losses are slightly above "
        f"ln(vocabulary) = {math.log(run.spec.model.vocab_size):.2f}."
    )


def _troubleshooting(run: Run) -> str:
    fewer = f"- **Fewer GPUs than {run.spec.world_size}.** NGPU must not exceed the visible GPUs (`nvidia-smi -L`)."
    return "\n".join([memory_help(run), backend_help(run), assets_help(run), fewer])


def _hardware(run: Run, figures: CardFigures, device: Device | None) -> str:
    link = "- The GPUs of a machine should share a fast link such as NVLink: parameters are gathered over it."
    if run.spec.degrees.dp_shard == 1:
        link = (
            "- Gradients are sent between GPUs once per step."
            if run.spec.world_size > 1
            else "- Nothing is sent between GPUs."
        )
    cpu = "- The same file runs on CPUs over gloo (`COMM_BACKEND=gloo`), slowly, for tests of small sizes."
    if device is None:
        return f"{link}\n{cpu}"
    training = run.config.training
    compute = training.mixed_precision_param
    peak = device.peak_flops(compute, training.float32_matmul_precision)
    if device.memory is None or device.memory_bandwidth is None or device.link_bandwidth is None:
        return f"{link}\n{cpu}"
    lines = [
        f"- {device.name}: {device.memory / 1e9:.0f} GB, {device.memory_bandwidth / 1e12:.3g} TB/s, {device.link} with "
        f"{device.link_bandwidth / 1e9:.0f} GB/s in each direction ({device.source})."
    ]
    if peak is None:
        lines.append(f"- This device has no units for {compute}.")
    else:
        least = figures.flops_per_token * run.spec.tokens_per_step / (peak * run.spec.world_size)
        lines.append(
            f"- Its peak for {compute} matrix products is {peak / 1e12:.4g} TFLOP/s, so a step takes at least "
            f"{format_seconds(least) if least >= 1 else f'{1000 * least:.0f} ms'}. This is a bound from arithmetic, "
            "not a measurement."
        )
    return "\n".join([*lines, link, cpu])


def _keys(run: Run) -> str:
    rows = []
    for key in sorted(run.origin):
        if key == "job.config_file":
            continue
        value: object = run.config
        for name in key.split("."):
            value = getattr(value, name)
        rows.append((f"{code(key)}", code(format_toml(value))))
    note = "All other keys have the defaults of `docs/configuration.md`."
    return f"{note}\n\n<details>\n<summary>{len(rows)} keys</summary>\n\n{table(('key', 'value'), rows)}\n\n</details>"
