"""Rules of a pipeline: how the model is split into stages, which rank holds them, and what a schedule requires."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from quadriga.config import pipeline_csv
from quadriga.config.pipeline_csv import ScheduleProblem
from quadriga.config.pipeline_order import PipelineOrder
from quadriga.config.rules import Conflict, Findings, RuleContext, rule
from quadriga.config.rules_layout import LOCAL, divisor_hint, divisors
from quadriga.errors import Problem, nearest
from quadriga.limits import STAGE_PASSES

PP = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
CSV = "parallelism.pipeline_parallel_schedule_csv"
MICROBATCH = "parallelism.pipeline_parallel_microbatch_size"
PER_STAGE = "parallelism.pipeline_parallel_layers_per_stage"
LISTED = "parallelism.module_fqns_per_model_part"
FIRST_LESS = "parallelism.pipeline_parallel_first_stage_less_layers"
LAST_LESS = "parallelism.pipeline_parallel_last_stage_less_layers"

SINGLE_STAGE = ("GPipe", "1F1B")
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")  # exactly two stages per rank, assigned in a V: 0, 1, ..., 1, 0
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SCHEDULES)  # gradients of inputs and of weights in separate passes


def stage_ranks(ctx: RuleContext) -> tuple[int, ...]:
    """The pipeline rank of each stage: assigned in a loop, in a V, or by the CSV file."""
    parallelism, pp = ctx.config.parallelism, ctx.degrees.pp
    if isinstance(custom := csv_schedule(ctx), PipelineOrder):
        return custom.stage_ranks
    if parallelism.pipeline_parallel_schedule in V_SCHEDULES and pp > 1:
        return (*range(pp), *reversed(range(pp)))
    return tuple(stage % pp for stage in range(stage_count(ctx)))


def stage_count(ctx: RuleContext) -> int:
    """The number of pipeline stages of the whole model."""
    parallelism = ctx.config.parallelism
    if ctx.degrees.pp == 1:
        return 1
    if isinstance(custom := csv_schedule(ctx), PipelineOrder):
        return len(custom.stage_ranks)
    if parallelism.module_fqns_per_model_part is not None:
        return len(parallelism.module_fqns_per_model_part)
    if parallelism.pipeline_parallel_layers_per_stage is None:
        return ctx.degrees.pp * (1 if parallelism.pipeline_parallel_schedule in SINGLE_STAGE else 2)
    return -(-(ctx.model.n_layers + _end_layers(ctx)) // parallelism.pipeline_parallel_layers_per_stage)


def _end_layers(ctx: RuleContext) -> int:
    """The weight, in layers, of the embedding (which can be a stage) and of the modules after the last layer."""
    parallelism = ctx.config.parallelism
    return parallelism.pipeline_parallel_first_stage_less_layers + parallelism.pipeline_parallel_last_stage_less_layers


def csv_schedule(ctx: RuleContext) -> PipelineOrder | list[ScheduleProblem] | None:
    """The schedule of the CSV file, or its problems; None without a file or without a pipeline."""
    if ctx.schedule_csv is None or ctx.degrees.pp == 1:
        return None
    return pipeline_csv.parse(ctx.schedule_csv, ctx.degrees.pp, micro_batches(ctx))


def custom_schedule(ctx: RuleContext) -> PipelineOrder | None:
    custom = csv_schedule(ctx)
    return custom if isinstance(custom, PipelineOrder) else None


def micro_batches(ctx: RuleContext) -> int:
    """The number of micro-batches of the pipeline in one pass."""
    return ctx.config.training.local_batch_size // ctx.config.parallelism.pipeline_parallel_microbatch_size


def splits_backward(ctx: RuleContext) -> str | None:
    """The name of the schedule, if it computes gradients of inputs and of weights in separate passes."""
    if isinstance(custom := csv_schedule(ctx), PipelineOrder):
        return "the schedule of the CSV file" if custom.splits_backward else None
    schedule = ctx.config.parallelism.pipeline_parallel_schedule
    return schedule if schedule in SPLIT_BACKWARD and ctx.degrees.pp > 1 else None


@rule(CSV, PP, LOCAL, MICROBATCH)
def csv_file_is_a_schedule(ctx: RuleContext) -> Findings:
    if not isinstance(problems := csv_schedule(ctx), list):
        return
    path = str(ctx.config.parallelism.pipeline_parallel_schedule_csv)
    for where, what in pipeline_csv.format_problems(problems, path):
        yield Problem(where, what, source=ctx.origin.get(CSV), allowed=pipeline_csv.FORMS)


@rule(PP, "model.flavor", "model.n_layers", SCHEDULE, PER_STAGE, FIRST_LESS, LAST_LESS)
def layers_fill_the_stages(ctx: RuleContext) -> Findings:
    pp, parallelism = ctx.degrees.pp, ctx.config.parallelism
    if pp == 1 or parallelism.module_fqns_per_model_part is not None:
        return
    if parallelism.pipeline_parallel_schedule_csv is not None:
        return
    stages = stage_count(ctx)
    if stages % pp:
        yield Conflict(f"{stages} stages do not divide over {pp} ranks", "choose other layers per stage")
    elif stages > (weight := ctx.model.n_layers + _end_layers(ctx)):
        what = f"{stages} stages need at least as many layers, and the model has {ctx.model.n_layers}"
        what += f" (and ends that count as {weight - ctx.model.n_layers})"
        yield Conflict(what, f"set model.n_layers to {stages} or more, or lower {PP}")
    elif parallelism.pipeline_parallel_layers_per_stage is not None:
        yield from _stages_fit_the_schedule(ctx, stages, "these layers per stage give")


@rule(PP, "model.flavor", "model.n_layers", CSV, LISTED, FIRST_LESS, LAST_LESS)
def csv_file_and_stages_fit(ctx: RuleContext) -> Findings:
    if not isinstance(custom := csv_schedule(ctx), PipelineOrder):
        return
    stages, listed = len(custom.stage_ranks), ctx.config.parallelism.module_fqns_per_model_part
    if listed is not None and len(listed) != stages:
        yield Conflict(f"{len(listed)} stages are listed, and the file computes {stages}")
    elif listed is None and stages > ctx.model.n_layers + _end_layers(ctx):
        yield Conflict(f"{stages} stages need at least as many layers, and the model has {ctx.model.n_layers}")


@rule(PP, FIRST_LESS, LAST_LESS, "model.flavor", "model.n_layers", LISTED)
def ends_are_lighter_than_a_stage(ctx: RuleContext) -> Findings:
    parallelism, stages = ctx.config.parallelism, stage_count(ctx)
    if ctx.degrees.pp == 1 or stages == 0 or parallelism.module_fqns_per_model_part is not None:
        return
    first, last = (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    each, more = divmod(ctx.model.n_layers + first + last, stages)
    for name, weight, share in (("first", first, each + (more > 0)), ("last", last, each)):
        if weight > share:
            what = f"the {name} stage has {share} layers, and its end alone weighs {weight}"
            yield Conflict(what, f"lower the weight to {share} or less")


@rule(PP, LISTED, SCHEDULE)
def listed_stages_divide_over_ranks(ctx: RuleContext) -> Findings:
    parts, pp = ctx.config.parallelism.module_fqns_per_model_part, ctx.degrees.pp
    if pp == 1 or parts is None or ctx.config.parallelism.pipeline_parallel_schedule_csv is not None:
        return
    if not parts or len(parts) % pp:
        yield Conflict(f"{len(parts)} listed stages do not divide over {pp} ranks", f"list a multiple of {pp} stages")
    else:
        yield from _stages_fit_the_schedule(ctx, len(parts), "the list gives")


def _stages_fit_the_schedule(ctx: RuleContext, stages: int, given: str) -> Iterator[Conflict]:
    per_rank, schedule = stages // ctx.degrees.pp, ctx.config.parallelism.pipeline_parallel_schedule
    if (per_rank == 1) != (schedule in SINGLE_STAGE) or (schedule in V_SCHEDULES and per_rank != 2):
        wanted = "one stage" if schedule in SINGLE_STAGE else "two stages"
        yield Conflict(f"{schedule} needs {wanted} per rank, and {given} {per_rank}")


@rule(PP, LISTED, "model.flavor", "model.n_layers")
def listed_stages_hold_the_model(ctx: RuleContext) -> Findings:
    """Each module once, in the order of the forward pass."""
    parts, units = ctx.config.parallelism.module_fqns_per_model_part, ctx.model.stage_units
    if ctx.degrees.pp == 1 or parts is None:
        return
    listed = [name for part in parts for name in part]
    unknown = [name for name in dict.fromkeys(listed) if name not in units]
    for name in unknown:
        yield Conflict(f"the model has no module `{name}`", allowed=_format_names(units), nearest=nearest(name, units))
    if missing := [unit for unit in units if unit not in listed]:
        yield Conflict(f"no stage holds {_format_names(missing)}", "list every module of the model")
    if doubled := [name for name, times in Counter(listed).items() if times > 1]:
        yield Conflict(f"listed more than once: {_format_names(doubled)}", "list every module once")
    if any(not part for part in parts):
        yield Conflict("a stage without a module computes nothing", "remove it, or give it a module")
    if not (unknown or missing or doubled) and (late := _first_late(listed, units)) is not None:
        yield Conflict(f"`{late[0]}` is before `{late[1]}`, which is earlier in the forward pass", _format_names(units))


def _first_late(listed: list[str], units: tuple[str, ...]) -> tuple[str, str] | None:
    """The first two neighbours in the wrong order."""
    return next(((one, other) for one, other in pairwise(listed) if units.index(one) > units.index(other)), None)


def _format_names(names: list[str] | tuple[str, ...]) -> str:
    """At most seven of them."""
    return ", ".join(names if len(names) <= 7 else [*names[:3], "...", *names[-3:]])


@rule(PP, "model.flavor", "model.tie_embeddings")
def tied_ends_are_on_one_rank(ctx: RuleContext) -> Findings:
    if ctx.degrees.pp > 1 and ctx.model.tie_embeddings:
        what = "the embedding and the output share one matrix, and they would be on different ranks of the pipeline"
        yield Conflict(what, "set model.tie_embeddings = false, or use another parallelism")


@rule(LOCAL, MICROBATCH, PP)
def local_batch_divides_into_micro_batches(ctx: RuleContext) -> Findings:
    rows, size = ctx.config.training.local_batch_size, ctx.config.parallelism.pipeline_parallel_microbatch_size
    if ctx.degrees.pp > 1 and rows % size:
        yield Conflict("the pipeline's micro-batches must divide the local batch", divisor_hint(MICROBATCH, rows, size))


@rule(PP, PER_STAGE, SCHEDULE, LOCAL, MICROBATCH)
def pipeline_is_of_a_size_that_can_be_planned(ctx: RuleContext) -> Findings:
    stages, count = stage_count(ctx), micro_batches(ctx)
    if ctx.degrees.pp > 1 and stages * count > STAGE_PASSES:
        what = f"{stages} stages x {count} micro-batches are more passes than a schedule may have"
        size = ctx.config.training.local_batch_size // max(STAGE_PASSES // stages, 1) + 1
        fix = f"set {MICROBATCH} to {size} or more" if stages < STAGE_PASSES else f"lower {PP}"
        yield Conflict(what, fix, f"at most {STAGE_PASSES}")


@rule(SCHEDULE, PP, LOCAL, MICROBATCH)
def micro_batches_fill_the_schedule(ctx: RuleContext) -> Findings:
    parallelism, pp, count = ctx.config.parallelism, ctx.degrees.pp, micro_batches(ctx)
    schedule = parallelism.pipeline_parallel_schedule
    if pp == 1 or parallelism.pipeline_parallel_schedule_csv is not None:
        return
    least = {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
    if count < least:
        fix = _more_micro_batches(ctx, least)
        yield Conflict(f"{schedule} over {pp} ranks needs at least {least} micro-batches, and there are {count}", fix)
    rounds = max(1, count // pp)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        yield Conflict(f"{schedule} works in {rounds} equal rounds, and {count} micro-batches do not divide into them")


def _more_micro_batches(ctx: RuleContext, least: int) -> str:
    """How a pass gets at least `least` micro-batches: with the global batch of the file, if that is possible."""
    size, rows = ctx.config.parallelism.pipeline_parallel_microbatch_size, ctx.config.training.global_batch_size
    local, ranks = least * size, ctx.degrees.batch
    if rows == -1:
        return f"raise {LOCAL} to {local} or more"
    own = [part for part in divisors(rows // ranks) if part >= local and part % size == 0] if rows % ranks == 0 else []
    if own:
        return f"set {LOCAL} to {min(own)}"
    return f"set {LOCAL} to {local} and training.global_batch_size to {max(rows // (local * ranks), 1) * local * ranks}"


@rule(SCHEDULE, PP, CSV, "compile.enable")
def schedule_allows_compiling(ctx: RuleContext) -> Findings:
    """torch's split backward pass finds modules that `torch.compile` wrapped, but not modules compiled in place, as
    Quadriga's are."""
    compile, schedule = ctx.config.compile, splits_backward(ctx)
    if schedule is not None and compile.compiles("model"):
        what = f"{schedule} splits the backward pass in two, which compiled blocks do not support"
        yield Conflict(what, "choose 1F1B or Interleaved1F1B, or compile only the loss")


@rule(PP, "parallelism.fsdp_prefetch")
def a_pipeline_gathers_by_its_schedule(ctx: RuleContext) -> Findings:
    """The schedule gathers whole stages ahead of time."""
    if ctx.degrees.pp > 1 and ctx.config.parallelism.fsdp_prefetch is not None:
        yield Conflict("a pipeline gathers whole stages ahead, not single blocks", "leave fsdp_prefetch out")


@rule(SCHEDULE, PP, CSV, "parallelism.fsdp_reshard_after_forward")
def split_backward_finds_the_weights(ctx: RuleContext) -> Findings:
    """torch needs the gathered weights at a time when only their shards are left."""
    if ctx.config.parallelism.fsdp_reshard_after_forward == "always" and (schedule := splits_backward(ctx)):
        what = f"{schedule} needs gathered parameters in the backward pass, and `always` frees them before"
        yield Conflict(what, 'set fsdp_reshard_after_forward = "default", or choose 1F1B or Interleaved1F1B')
