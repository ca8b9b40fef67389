"""Rules that are not about the layout: compile, schedule, checkpoints, profiling, folders, user code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from quadriga.config.assets import BUILTIN_TOKENIZER
from quadriga.config.rules import Conflict, Findings, RuleContext, config_value, rule
from quadriga.config.rules_layout import ASYNC_TP, TP
from quadriga.config.schema import JobConfig
from quadriga.errors import UserError
from quadriga.hardware import device_named

SEQUENCE_PARALLEL = "parallelism.enable_sequence_parallel"
FLOAT8 = "quantize.linear.float8"
GATHER = f"{FLOAT8}.enable_fsdp_float8_all_gather"
PRECOMPUTE = f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp"
FILTER = f"{FLOAT8}.filter_fqns"
STATE_DTYPE = "optimizer.state_dtype"
STOCHASTIC = "optimizer.stochastic_rounding"
LEAST_FALL = 2**-8  # half the relative spacing of bfloat16 numbers just above a power of two
SCHEDULE = ("lr_scheduler.warmup_steps", "training.steps")
CYCLE = ("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active")
# What a run writes to its folder under names of its own.
RUN_FILES = {".lock", "config.toml", "environment.json", "estimate.json", "estimates", "documents"}
RUN_FILES |= {"metrics.jsonl", "events.jsonl", "bad_batches.jsonl"}
OUTPUT_FOLDERS = (
    "profiling.save_traces_folder",
    "metrics.save_tb_folder",
    "checkpoint.folder",
    "comm.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
)
USER_CODE = ("job.custom_config_module", "experimental.custom_import", "experimental.custom_args_module")


@rule(ASYNC_TP, TP, SEQUENCE_PARALLEL, "compile.enable", "compile.components", "compile.backend")
def async_tensor_parallel_has_something_to_overlap(ctx: RuleContext) -> Findings:
    compile = ctx.config.compile
    if not ctx.config.parallelism.enable_async_tensor_parallel:
        return
    if ctx.degrees.tp == 1:
        yield f"{ASYNC_TP} has no effect without tensor parallelism"
    elif not compile.compiles("model"):
        yield Conflict(
            "the compiler creates the overlap", 'set compile.enable = true, with "model" in compile.components'
        )
    elif compile.backend != "inductor":
        yield Conflict("inductor creates the overlap", 'set compile.backend = "inductor"')
    elif not ctx.config.parallelism.enable_sequence_parallel:
        what = "only the collectives of sequence parallelism are overlapped"
        yield Conflict(what, f"set {SEQUENCE_PARALLEL} = true, or {ASYNC_TP} = false")


@rule("activation_checkpoint.mode", "compile.enable", "compile.components")
def memory_budget_needs_compile(ctx: RuleContext) -> Findings:
    compile = ctx.config.compile
    if ctx.config.activation_checkpoint.mode == "memory_budget" and not compile.compiles("model"):
        fix = 'set compile.enable = true, with "model" in compile.components; or choose "selective" or "full"'
        yield Conflict("the compiler chooses what to recompute within the budget", fix)


@rule("activation_checkpoint.debug", "activation_checkpoint.mode", "activation_checkpoint.selective_ac_option")
def recompute_records_need_whole_blocks(ctx: RuleContext) -> Findings:
    recompute = ctx.config.activation_checkpoint
    if recompute.debug and recompute.per_operation:
        what = 'PyTorch cannot record a failed recomputation with selective_ac_option = "op"'
        yield Conflict(what, 'set selective_ac_option = "1" to debug it, or debug = false')


def emulates_float8(config: JobConfig) -> bool:
    return config.quantize.linear.float8.emulate and FLOAT8 in config.model.converters


@rule("compile.enable", "compile.components", "quantize.linear.float8.emulate", "model.converters")
def emulation_is_eager(ctx: RuleContext) -> Findings:
    if emulates_float8(ctx.config) and ctx.config.compile.compiles("model"):
        fix = 'set compile.enable = false, or compile.components = ["loss"], or emulate = false'
        yield Conflict("emulated float8 runs in eager mode only", fix)


@rule("quantize.linear.float8.enable_fsdp_float8_all_gather", "quantize.linear.float8.recipe_name", "model.converters")
def float8_gather_is_tensorwise(ctx: RuleContext) -> Findings:
    float8 = ctx.config.quantize.linear.float8
    wanted = float8.enable_fsdp_float8_all_gather and "quantize.linear.float8" in ctx.config.model.converters
    if wanted and float8.recipe_name not in (None, "tensorwise"):
        yield Conflict("only tensorwise scaling can gather weights in float8", allowed='"tensorwise", or none')


@rule(PRECOMPUTE, GATHER, "training.enable_cpu_offload", "model.converters")
def float8_scales_are_of_gathered_weights(ctx: RuleContext) -> Findings:
    float8 = ctx.config.quantize.linear.float8
    if not float8.precompute_float8_dynamic_scale_for_fsdp or FLOAT8 not in ctx.config.model.converters:
        return
    if not float8.enable_fsdp_float8_all_gather:
        what = f"it computes the scales of weights that are gathered in float8 ({GATHER})"
        yield f"{PRECOMPUTE} has no effect: {what}"
    elif ctx.config.training.enable_cpu_offload:
        yield Conflict("scales of weights on the CPU cannot be reduced over GPUs", f"set {PRECOMPUTE} = false")


@rule(FILTER, "model.converters")
def float8_excludes_the_output_layer(ctx: RuleContext) -> Findings:
    if FLOAT8 in ctx.config.model.converters and FILTER not in ctx.origin:
        yield f'{FILTER} = ["output"] by default: the output layer is not converted (torchtitan: [], which converts it)'


@rule(FILTER, "quantize.linear.float8.recipe_name", "model.converters")
def float8_thresholds_are_known(ctx: RuleContext) -> Findings:
    float8 = ctx.config.quantize.linear.float8
    wanted = "auto_filter_small_kn" in float8.filter_fqns and FLOAT8 in ctx.config.model.converters
    if wanted and float8.recipe_name == "rowwise_with_gw_hp":
        yield Conflict("torchao has no thresholds for this recipe", "list layers to exclude by parts of their names")


@rule("model.converters")
def one_recipe_a_layer(ctx: RuleContext) -> Findings:
    for kind in ("quantize.linear", "quantize.grouped_mm"):
        asked = [name for name in ctx.config.model.converters if name.startswith(kind)]
        if len(asked) > 1:
            yield Conflict(f"{' and '.join(asked)} convert the same layers", "keep one of them")


@rule("lr_scheduler.warmup_steps", "training.steps", "lr_scheduler.total_steps", "lr_scheduler.variant")
def warmup_ends_within_the_run(ctx: RuleContext) -> Findings:
    schedule, steps = ctx.config.lr_scheduler, ctx.config.training.steps
    warmup, total = schedule.warmup_steps, schedule.total_steps or steps
    key = "training.steps" if schedule.total_steps is None else "lr_scheduler.total_steps"
    if warmup > total:
        what = f"lr_scheduler.warmup_steps = {warmup} is longer than {key} = {total}"
        cut_off = schedule.variant == "early_decay"
        yield f"{what}: the warm-up is {'cut off, not rescaled' if cut_off else f'shortened to {total} steps'}"
    elif warmup > steps:
        what = f"lr_scheduler.warmup_steps = {warmup} is longer than training.steps = {steps}"
        yield f"{what}: the run ends within the warm-up"


@rule("lr_scheduler.total_steps", *SCHEDULE, "optimizer.lr")
def schedule_covers_the_run(ctx: RuleContext) -> Findings:
    schedule, steps = ctx.config.lr_scheduler, ctx.config.training.steps
    total = schedule.total_steps
    if total is None or total >= steps:
        return
    decays = schedule.phases(steps).decay > 0 or schedule.variant == "early_decay"
    rate = ctx.config.optimizer.lr * (schedule.min_lr_factor if decays else 1.0)
    yield (
        f"lr_scheduler.total_steps = {total} ends before training.steps = {steps}: the rate stays at its last value, "
        f"{rate:g}, from step {total + 1} on (torchtitan v0.2.2 continues the formula: negative or rising rates)"
    )


@rule("lr_scheduler.decay_ratio", *SCHEDULE, "lr_scheduler.total_steps")
def decay_fits_beside_the_warmup(ctx: RuleContext) -> Findings:
    schedule = ctx.config.lr_scheduler
    phases = schedule.phases(ctx.config.training.steps)
    if phases.decay < phases.wanted_decay:
        what = f"a warm-up of {phases.warmup} and a decay of {phases.wanted_decay} steps exceed {phases.total}"
        yield f"{what}: the decay is shortened to {phases.decay} steps"


@rule(*CYCLE)
def profiler_fits_its_cycle(ctx: RuleContext) -> Findings:
    profiling = ctx.config.profiling
    needed = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < needed:
        yield Conflict("a cycle includes the warm-up and the recorded steps", f"set {CYCLE[0]} to {needed} or more")


@rule("profiling.enable_profiling", "profiling.profile_freq", "training.steps")
def profiler_finishes_a_cycle(ctx: RuleContext) -> Findings:
    profiling, steps = ctx.config.profiling, ctx.config.training.steps
    if profiling.enable_profiling and profiling.profile_freq > steps:
        what = f"profiling.profile_freq = {profiling.profile_freq} is longer than training.steps = {steps}"
        yield f"{what}: the last steps are traced"


@rule("checkpoint.keep_latest_k", "checkpoint.enable")
def two_saves_are_kept(ctx: RuleContext) -> Findings:
    checkpoint = ctx.config.checkpoint
    if checkpoint.enable and checkpoint.keep_latest_k == 1:
        yield Conflict("while a checkpoint is written, an older one must be kept", allowed="0 (all), or 2 and more")


@rule("checkpoint.enable", "checkpoint.initial_load_path")
def initial_load_needs_checkpoints(ctx: RuleContext) -> Findings:
    checkpoint = ctx.config.checkpoint
    if checkpoint.initial_load_path is not None and not checkpoint.enable:
        yield Conflict(
            "[checkpoint] loads the weights, and it is off",
            "set checkpoint.enable = true (and load_only = true, to save nothing)",
        )


@rule("checkpoint.load_step", "training.steps", "checkpoint.enable")
def load_step_lies_within_the_run(ctx: RuleContext) -> Findings:
    checkpoint, steps = ctx.config.checkpoint, ctx.config.training.steps
    if checkpoint.enable and checkpoint.load_step > steps:
        yield Conflict(
            "the run would end before the step that it resumes from", "raise training.steps, or load an earlier step"
        )


@rule("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only", "checkpoint.enable")
def hf_weights_are_weights_alone(ctx: RuleContext) -> Findings:
    checkpoint = ctx.config.checkpoint
    if checkpoint.enable and checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        fix = "set checkpoint.initial_load_model_only = true"
        yield Conflict("Hugging Face weights have no optimizer state and no position in the data", fix)


@rule("checkpoint.initial_load_in_hf", "checkpoint.initial_load_path", "model.hf_assets_path", "checkpoint.enable")
def hf_weights_lie_somewhere(ctx: RuleContext) -> Findings:
    checkpoint, assets = ctx.config.checkpoint, ctx.config.model.hf_assets_path
    if not (checkpoint.enable and checkpoint.initial_load_in_hf) or checkpoint.initial_load_path is not None:
        return
    if assets == BUILTIN_TOKENIZER:
        yield Conflict("no folder of weights is given", "set checkpoint.initial_load_path to the folder of safetensors")


@rule("checkpoint.export_dtype", "checkpoint.last_save_model_only", "checkpoint.last_save_in_hf")
def export_needs_a_save_of_weights(ctx: RuleContext) -> Findings:
    checkpoint = ctx.config.checkpoint
    exported = checkpoint.last_save_model_only or checkpoint.last_save_in_hf
    if checkpoint.enable and checkpoint.export_dtype != "float32" and not exported:
        fix = "set checkpoint.last_save_model_only = true, or checkpoint.last_save_in_hf = true"
        yield Conflict(
            "a checkpoint with optimizer state is saved unchanged; only a save of the weights is converted", fix
        )


@rule("debug.deterministic", "debug.deterministic_warn_only")
def warn_only_needs_deterministic(ctx: RuleContext) -> Findings:
    if ctx.config.debug.deterministic_warn_only and not ctx.config.debug.deterministic:
        yield "debug.deterministic_warn_only has no effect without debug.deterministic"


@rule("training.dtype")
def narrow_parameters_lose_small_updates(ctx: RuleContext) -> Findings:
    if ctx.config.training.dtype == "bfloat16" and not ctx.config.optimizer.stochastic_rounding:
        held = "training.dtype = bfloat16 holds the parameters themselves in bfloat16"
        yield f"{held}: small updates are rounded away without {STOCHASTIC} = true"


@rule(STOCHASTIC, STATE_DTYPE, "training.dtype")
def something_is_rounded(ctx: RuleContext) -> Findings:
    optimizer, dtype = ctx.config.optimizer, ctx.config.training.dtype
    if optimizer.stochastic_rounding and "bfloat16" not in (optimizer.state_dtype, dtype):
        yield f"{STOCHASTIC} has no effect: neither weights nor moments are in bfloat16"


@rule(STATE_DTYPE, "optimizer.beta1", "optimizer.beta2", "training.dtype", STOCHASTIC)
def moments_can_fall(ctx: RuleContext) -> Findings:
    """With small gradients, a moment decreases by the fraction 1 - beta per step.

    bfloat16 has 8 significant bits: the spacing of numbers is at most 2^-7 of their value, and a change by less than
    half of that is rounded away. If 1 - beta < 2^-8, some numbers in each octave do not decrease, and smaller ones are
    never reached. If 1 - beta < 2^-9, none decreases. A second moment that stays too large makes all later updates too
    small. Stochastic rounding decreases them on average.
    """
    optimizer = ctx.config.optimizer
    if (optimizer.state_dtype or ctx.config.training.dtype) != "bfloat16" or optimizer.stochastic_rounding:
        return
    for name in ("beta1", "beta2"):
        beta = getattr(optimizer, name)
        if 1 - beta >= LEAST_FALL:
            continue
        what = (
            f"optimizer.{name} = {beta:g} decreases a moment by {1 - beta:.2g} of its value per step, and bfloat16 "
            "rounds away less than 2^-8 (0.0039) of it: the moment would not decrease"
        )
        never = name == "beta2" and 1 - beta < LEAST_FALL / 2
        if optimizer.state_dtype is None and not never:
            yield f'{what}; use {STATE_DTYPE} = "float32", or {STOCHASTIC} = true'
        else:
            fix = f'set {STATE_DTYPE} = "float32", or {STOCHASTIC} = true, or optimizer.{name} to 0.996 or less'
            yield Conflict(what, fix)


@rule("training.dataloader.persistent_workers")
def workers_persist_anyway(ctx: RuleContext) -> Findings:
    if ctx.config.training.dataloader.persistent_workers:
        yield "training.dataloader.persistent_workers has no effect: workers always run until the run ends"


@rule(*OUTPUT_FOLDERS)
def folders_are_apart(ctx: RuleContext) -> Findings:
    plain = [config_value(ctx.config, key).strip("./") for key in OUTPUT_FOLDERS]
    if len(set(plain)) < len(plain):
        yield Conflict("two kinds of output would share one folder", "give each its own folder")


@rule("job.save_config_file", *OUTPUT_FOLDERS)
def configuration_replaces_nothing(ctx: RuleContext) -> Findings:
    if (name := ctx.config.job.save_config_file) is None:
        return
    path, folders = PurePath(name), [PurePath(config_value(ctx.config, key)) for key in OUTPUT_FOLDERS]
    if path.is_absolute() or ".." in path.parts or not path.name:
        yield Conflict("the configuration is written into the run folder", allowed="a name like all.json")
    elif path.parts[0] in RUN_FILES or any(path in (one, *one.parents) or one in path.parents for one in folders):
        yield Conflict("the run itself writes there, and would lose its files", "choose another name, like all.json")


@rule(*OUTPUT_FOLDERS)
def folders_replace_no_file(ctx: RuleContext) -> Findings:
    for key in OUTPUT_FOLDERS:
        name = str(config_value(ctx.config, key))
        if PurePath(name).parts[:1] and PurePath(name).parts[0] in RUN_FILES:
            yield Conflict(f"{key} = {name}: the run itself writes a file of this name", "choose another folder")


def _refuse_user_code(key: str) -> Callable[[RuleContext], Findings]:
    def user_code_comes_through_python(ctx: RuleContext) -> Findings:
        if config_value(ctx.config, key):
            what = "configuration files cannot import code"
            fix = "leave it empty, and use your code through Python: import quadriga and call its builders"
            yield Conflict(what, fix)

    return user_code_comes_through_python


for _key in USER_CODE:
    rule(_key)(_refuse_user_code(_key))


@rule("estimate.device")
def device_is_known(ctx: RuleContext) -> Findings:
    if ctx.config.estimate.device is not None:
        try:
            device_named(ctx.config.estimate.device, "estimate.device")
        except UserError as error:
            yield from (Conflict(each.what, each.fix or "", each.allowed, each.nearest) for each in error.problems)


@rule("debug.moe_force_load_balance", "parallelism.expert_parallel_comm_backend")
def expert_settings_have_no_effect(ctx: RuleContext) -> Findings:
    if ctx.config.debug.moe_force_load_balance or ctx.config.parallelism.expert_parallel_comm_backend != "standard":
        yield f"{ctx.model.name} has no experts: their settings have no effect"


@rule("activation_checkpoint.selective_ac_option", "model.n_layers")
def selective_option_meets_a_block(ctx: RuleContext) -> Findings:
    recompute, layers = ctx.config.activation_checkpoint, ctx.model.n_layers
    option = recompute.selective_ac_option
    if recompute.mode == "selective" and option != "op" and int(option) > layers:
        yield f"activation_checkpoint.selective_ac_option = {option} exceeds the {layers} blocks: nothing is recomputed"
