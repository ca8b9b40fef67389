"""Resolves a configuration: fills in every `-1`, makes every automatic choice, and checks the rules between keys.

It reads no files: facts about models, tokenizers and backends are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath

from quadriga.config import (
    rules_data,
    rules_layout,
    rules_mixture,
    rules_pipeline,
    rules_run,
    rules_torchtitan,
    rules_validation,
)
from quadriga.config.keys import format_toml
from quadriga.config.load import LoadedConfig
from quadriga.config.model_spec import ROPE_SCALINGS, ModelSpec
from quadriga.config.rules import RULES, RuleContext, join_sources
from quadriga.config.run_spec import BackendFacts, Degrees, Folders, RunSpec, TokenizerFacts, ValidationSpec
from quadriga.config.schema import JobConfig, Parallelism
from quadriga.errors import Problem, nearest
from quadriga.units import DTYPE_BYTES, GIB, format_bytes

Catalogue = Mapping[str, Mapping[str, ModelSpec]]
RULE_MODULES = (
    rules_data,
    rules_layout,
    rules_mixture,
    rules_pipeline,
    rules_run,
    rules_torchtitan,
    rules_validation,
)  # their import registers the rules

DEGREES = {
    "dp_replicate": "parallelism.data_parallel_replicate_degree",
    "dp_shard": "parallelism.data_parallel_shard_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
}
GRADIENTS_KEPT_WHOLE = 8 * GIB  # per rank, the limit of unsharded gradients that are reduced once per step


@dataclass
class Resolved:
    """The result of `resolve`. `spec` is None if there are problems."""

    spec: RunSpec | None = None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def resolve(
    loaded: LoadedConfig,
    *,
    catalogue: Catalogue,
    backends: Mapping[str, BackendFacts],
    tokenizer: TokenizerFacts,
    world_size: int | None,
    training: bool,
    schedule_csv: str | None = None,
) -> Resolved:
    """Check the rules between keys, and resolve the configuration. Rules about a key that is already wrong are skipped.

    Args:
        loaded: the configuration as read; its `bad` keys have their defaults.
        world_size: number of ranks; None: the product of the degrees.
        training: False for a dry run, which accepts what training does not support yet.
        schedule_csv: the text of the file `parallelism.pipeline_parallel_schedule_csv`.
    """
    result, config, bad = Resolved(), loaded.config, set(loaded.bad)
    model, problem = _pick_model(config, catalogue, loaded.origin)
    if problem is not None:
        if not {"model.name", "model.flavor"} & bad:
            result.problems.append(problem)
        bad |= {"model.name", "model.flavor"}
    degrees, problem = _fit_degrees(config.parallelism, world_size, loaded.origin)
    if problem is not None:
        if not bad.intersection(DEGREES.values()):
            result.problems.append(problem)
        bad.add(DEGREES["dp_shard"])

    ctx = RuleContext(config, loaded.origin, model, degrees, tokenizer, backends, training, schedule_csv)
    if config.compile.enable == "auto" and (choice := _compile_choice(ctx)) is not None:
        enable, why = choice
        loaded.update("compile", enable=enable)
        ctx = replace(ctx, config=loaded.config)
        result.notices.append(f'compile.enable = "auto" is {format_toml(enable)}: {why}')
    findings = [finding for rule in RULES if not bad.intersection(rule.keys) for finding in rule.apply(ctx)]
    result.problems += [finding for finding in findings if isinstance(finding, Problem)]
    result.notices += [finding for finding in findings if isinstance(finding, str)]
    if not result.problems and not loaded.problems:
        result.spec = build_spec(ctx)
    return result


def _compile_choice(ctx: RuleContext) -> tuple[bool, str] | None:
    """What `compile.enable = "auto"` is, and why; None if only the device decides, and the backend does not name it."""
    config, backend = ctx.config, ctx.backends.get(ctx.config.comm.backend or "")
    if config.activation_checkpoint.mode == "memory_budget":
        return True, 'activation_checkpoint.mode = "memory_budget" needs the compiler'
    if config.parallelism.enable_async_tensor_parallel and ctx.degrees.tp > 1:
        return True, f"{rules_layout.ASYNC_TP} needs the compiler"
    if "model" in config.compile.components:
        if schedule := rules_pipeline.splits_backward(ctx):
            return False, f"{schedule} splits the backward pass, which compiled blocks do not support"
        if rules_run.emulates_float8(config):
            return False, "emulated float8 runs in eager mode only"
    if backend is None:
        return None
    return backend.device_type == "cuda", f"the run computes on {'GPUs' if backend.device_type == 'cuda' else 'a CPU'}"


def _pick_model(config: JobConfig, catalogue: Catalogue, origin: Mapping[str, str]) -> tuple[ModelSpec, Problem | None]:
    """The model of `model.name` and `model.flavor`, with the overrides of single dimensions."""
    section, problem = config.model, None
    family = catalogue.get(section.name)
    if family is None:
        key, known, value = "model.name", list(catalogue), section.name
        what = "no model family has this name"
    elif section.flavor not in family:
        key, known, value = "model.flavor", list(family), section.flavor
        what = f"{section.name} has no such size"
    else:
        names = {spec_field.name for spec_field in fields(ModelSpec)} - {"name", "flavor"}
        asked = {name: getattr(section, name, None) for name in names - {"rope_scaling"}}
        spec = family[section.flavor]
        if section.rope_scaling != "flavor":
            spec = replace(spec, rope_scaling=ROPE_SCALINGS[section.rope_scaling])
        return replace(spec, **{name: value for name, value in asked.items() if value is not None}), None
    problem = Problem(
        key,
        what,
        format_toml(getattr(section, key.removeprefix("model."))),
        origin.get(key, "default"),
        ", ".join(known),
        nearest(value, known),
    )
    any_model = next(iter(next(iter(catalogue.values())).values()))
    return any_model, problem


def _fit_degrees(
    section: Parallelism, world_size: int | None, origin: Mapping[str, str]
) -> tuple[Degrees, Problem | None]:
    """The degrees with -1 filled in, so that their product is the number of ranks; or a problem."""
    shard = section.data_parallel_shard_degree
    others = Degrees(
        dp_replicate=section.data_parallel_replicate_degree,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
        pp=section.pipeline_parallel_degree,
    )
    rest = others.world_size
    if world_size is None:
        return replace(others, dp_shard=max(shard, 1)), None
    if shard == -1 and world_size % rest == 0:
        return replace(others, dp_shard=world_size // rest), None
    if shard != -1 and shard * rest == world_size:
        return replace(others, dp_shard=shard), None
    values = {"dp_replicate": others.dp_replicate, "dp_shard": shard, "tp": others.tp, "pp": others.pp, "cp": others.cp}
    where = " x ".join(f"{key} ({values[name]})" for name, key in DEGREES.items())
    sources = join_sources(origin[key] for key in DEGREES.values() if key in origin)
    if shard == -1:
        what = f"{world_size} ranks cannot be divided by {rest}, the product of the other degrees"
        allowed = f"a number of ranks that is a multiple of {rest}"
    else:
        what = f"the degrees multiply to {shard * rest}, and there are {world_size} ranks"
        allowed = f"degrees whose product is {world_size}"
    ranks = max(shard, 1) * rest
    fix = f"start {ranks} rank{'s' * (ranks > 1)} (NGPU={ranks} on one machine), or change the degrees"
    if shard != -1 and world_size % rest == 0:
        fix += f"; {DEGREES['dp_shard']} = -1 takes what remains"
    return others, Problem(where, what, None, sources or "default", allowed, fix=fix)


def build_spec(ctx: RuleContext) -> RunSpec:
    """The resolved run of a configuration that breaks no rule."""
    config, degrees = ctx.config, ctx.degrees
    training = config.training
    batch_per_pass = training.local_batch_size * degrees.batch
    global_batch = batch_per_pass if training.global_batch_size == -1 else training.global_batch_size
    reshard = config.parallelism.fsdp_reshard_after_forward
    accumulation = global_batch // batch_per_pass
    in_pipeline = training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
    micro_batches = accumulation * (in_pipeline if degrees.pp > 1 else 1)
    reduce, reason = _when_to_reduce(ctx, micro_batches)
    return RunSpec(
        world_size=degrees.world_size,
        degrees=degrees,
        model=ctx.model,
        tokenizer=ctx.tokenizer,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        global_batch_size=global_batch,
        accumulation_steps=accumulation,
        micro_batches=micro_batches,
        steps=training.steps,
        seed=config.debug.seed,
        reshard_after_forward=degrees.pp == 1 if reshard == "default" else reshard == "always",
        reshard_ends=reshard == "always" and training.loss_chunks == 1,  # chunks use the output layer later
        reduce_gradients=reduce,
        reduce_reason=reason,
        backend=config.comm.backend,
        folders=_folders(config),
        stage_ranks=rules_pipeline.stage_ranks(ctx),
        custom_schedule=rules_pipeline.custom_schedule(ctx),
        validation=_validation_spec(config, degrees),
    )


def _validation_spec(config: JobConfig, degrees: Degrees) -> ValidationSpec | None:
    section, training = config.validation, config.training
    if not section.enable:
        return None
    rows, windows = section.local_batch_size or training.local_batch_size, section.windows
    if section.steps is not None:
        windows = section.steps if section.steps == -1 else section.steps * rows * degrees.batch
    return ValidationSpec(section.seq_len or training.seq_len, rows, None if windows == -1 else windows)


def _when_to_reduce(ctx: RuleContext, micro_batches: int) -> tuple[str, str]:
    """`once` or `every_micro_batch`, and why. `once` keeps unsharded gradients in memory between micro-batches."""
    choice, degrees = ctx.config.parallelism.reduce_gradients, ctx.degrees
    if choice != "auto":
        return choice, "set in the configuration"
    if micro_batches == 1:
        return "once", "there is one micro-batch per step"
    if degrees.dp_shard * degrees.cp == 1:
        return "once", "gradients are not sharded, so this costs no memory"
    each = DTYPE_BYTES[ctx.config.training.mixed_precision_reduce]
    size = each * ctx.model.n_parameters // (degrees.tp * degrees.pp)
    if size <= GRADIENTS_KEPT_WHOLE:
        return "once", f"unsharded gradients take {format_bytes(size)} per rank"
    return "every_micro_batch", f"unsharded gradients would take {format_bytes(size)} per rank"


def checkpoint_folder(config: JobConfig) -> str:
    """The folder of checkpoints: inside the run folder, or the URL of an object store."""
    name = config.checkpoint.folder
    return name if "://" in name else str(PurePath(config.job.dump_folder) / name)


def _folders(config: JobConfig) -> Folders:
    dump = PurePath(config.job.dump_folder)
    return Folders(
        dump=str(dump),
        checkpoint=checkpoint_folder(config),
        tensorboard=str(dump / config.metrics.save_tb_folder),
        traces=str(dump / config.profiling.save_traces_folder),
        memory_snapshots=str(dump / config.profiling.save_memory_snapshot_folder),
        comm_traces=str(dump / config.comm.save_traces_folder),
    )
