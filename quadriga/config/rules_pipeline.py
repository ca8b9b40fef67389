"""Rules of a pipeline: how the model is cut into stages, who holds them, and what a schedule asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from quadriga.config import pipeline_csv
from quadriga.config.case import Case, Clash, Verdicts, rule
from quadriga.config.model_spec import ModelSpec
from quadriga.config.pipeline_csv import Fault
from quadriga.config.pipeline_order import Order
from quadriga.config.rules_layout import LOCAL, divisor_hint
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
V_STYLE = ("ZBVZeroBubble", "DualPipeV")  # exactly two stages a rank, dealt out there and back
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_STYLE)  # gradients of inputs and of weights are computed apart


def stage_units(model: ModelSpec) -> tuple[str, ...]:
    """The modules that a pipeline may cut between, in the order of the forward pass, as the model's plan has them."""
    return ("tok_embeddings", *(f"layers.{layer}" for layer in range(model.n_layers)), "norm", "output")


def stage_ranks(case: Case) -> tuple[int, ...]:
    """Which rank of the pipeline holds each stage: dealt out in a loop, or in a V, or as the CSV file says."""
    parallelism, pp = case.config.parallelism, case.degrees.pp
    if isinstance(custom := csv_schedule(case), Order):
        return custom.stage_ranks
    if parallelism.pipeline_parallel_schedule in V_STYLE and pp > 1:
        return (*range(pp), *reversed(range(pp)))
    return tuple(stage % pp for stage in range(stage_count(case)))


def stage_count(case: Case) -> int:
    """Pipeline stages of the whole model."""
    parallelism = case.config.parallelism
    if case.degrees.pp == 1:
        return 1
    if isinstance(custom := csv_schedule(case), Order):
        return len(custom.stage_ranks)
    if parallelism.module_fqns_per_model_part is not None:
        return len(parallelism.module_fqns_per_model_part)
    if parallelism.pipeline_parallel_layers_per_stage is None:
        return case.degrees.pp * (1 if parallelism.pipeline_parallel_schedule in SINGLE_STAGE else 2)
    return -(-(case.model.n_layers + _weight_of_ends(case)) // parallelism.pipeline_parallel_layers_per_stage)


def _weight_of_ends(case: Case) -> int:
    """In layers: of the embedding, which alone may be a stage, and of what follows the last layer."""
    parallelism = case.config.parallelism
    return parallelism.pipeline_parallel_first_stage_less_layers + parallelism.pipeline_parallel_last_stage_less_layers


def csv_schedule(case: Case) -> Order | list[Fault] | None:
    """The schedule of the CSV file or what is wrong with it; None where there is no file, or no pipeline."""
    if case.schedule_csv is None or case.degrees.pp == 1:
        return None
    return pipeline_csv.parse(case.schedule_csv, case.degrees.pp, micro_batches(case))


def own_schedule(case: Case) -> Order | None:
    custom = csv_schedule(case)
    return custom if isinstance(custom, Order) else None


def micro_batches(case: Case) -> int:
    """Micro-batches of the pipeline in one pass."""
    return case.config.training.local_batch_size // case.config.parallelism.pipeline_parallel_microbatch_size


def splits_backward(case: Case) -> str | None:
    """The schedule, if it computes gradients of inputs and of weights apart."""
    if isinstance(custom := csv_schedule(case), Order):
        return "the schedule of the CSV file" if custom.splits_backward else None
    schedule = case.config.parallelism.pipeline_parallel_schedule
    return schedule if schedule in SPLIT_BACKWARD and case.degrees.pp > 1 else None


@rule(CSV, PP, LOCAL, MICROBATCH)
def csv_file_is_a_schedule(case: Case) -> Verdicts:
    if not isinstance(faults := csv_schedule(case), list):
        return
    path = str(case.config.parallelism.pipeline_parallel_schedule_csv)
    for where, what in pipeline_csv.show(faults, path):
        yield Problem(where, what, source=case.origin.get(CSV), allowed=pipeline_csv.FORMS)


@rule(PP, "model.flavor", "model.n_layers", SCHEDULE, PER_STAGE, FIRST_LESS, LAST_LESS)
def layers_fill_the_stages(case: Case) -> Verdicts:
    pp, parallelism = case.degrees.pp, case.config.parallelism
    if pp == 1 or parallelism.module_fqns_per_model_part is not None:
        return
    if parallelism.pipeline_parallel_schedule_csv is not None:
        return
    stages = stage_count(case)
    if stages % pp:
        yield Clash(f"{stages} stages do not divide over {pp} ranks", "choose other layers per stage")
    elif stages > (room := case.model.n_layers + _weight_of_ends(case)):
        what = f"{stages} stages need at least as many layers, and the model has {case.model.n_layers}"
        what += f" (and ends that count as {room - case.model.n_layers})"
        yield Clash(what, f"set model.n_layers to {stages} or more, or lower {PP}")
    elif parallelism.pipeline_parallel_layers_per_stage is not None:
        yield from _stages_fit_the_schedule(case, stages, "these layers per stage give")


@rule(PP, "model.flavor", "model.n_layers", CSV, LISTED, FIRST_LESS, LAST_LESS)
def csv_file_and_stages_fit(case: Case) -> Verdicts:
    if not isinstance(custom := csv_schedule(case), Order):
        return
    stages, listed = len(custom.stage_ranks), case.config.parallelism.module_fqns_per_model_part
    if listed is not None and len(listed) != stages:
        yield Clash(f"{len(listed)} stages are listed, and the file computes {stages}")
    elif listed is None and stages > case.model.n_layers + _weight_of_ends(case):
        yield Clash(f"{stages} stages need at least as many layers, and the model has {case.model.n_layers}")


@rule(PP, FIRST_LESS, LAST_LESS, "model.flavor", "model.n_layers", LISTED)
def ends_are_lighter_than_a_stage(case: Case) -> Verdicts:
    parallelism, stages = case.config.parallelism, stage_count(case)
    if case.degrees.pp == 1 or stages == 0 or parallelism.module_fqns_per_model_part is not None:
        return
    first, last = (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    each, more = divmod(case.model.n_layers + first + last, stages)
    for name, weight, share in (("first", first, each + (more > 0)), ("last", last, each)):
        if weight > share:
            what = f"the {name} stage has room for {share} layers, and its end alone weighs {weight}"
            yield Clash(what, f"lower the weight to {share} or less")


@rule(PP, LISTED, SCHEDULE)
def listed_stages_divide_over_ranks(case: Case) -> Verdicts:
    parts, pp = case.config.parallelism.module_fqns_per_model_part, case.degrees.pp
    if pp == 1 or parts is None or case.config.parallelism.pipeline_parallel_schedule_csv is not None:
        return
    if not parts or len(parts) % pp:
        yield Clash(f"{len(parts)} listed stages do not divide over {pp} ranks", f"list a multiple of {pp} stages")
    else:
        yield from _stages_fit_the_schedule(case, len(parts), "the list gives")


def _stages_fit_the_schedule(case: Case, stages: int, given: str) -> Iterator[Clash]:
    per_rank, schedule = stages // case.degrees.pp, case.config.parallelism.pipeline_parallel_schedule
    if (per_rank == 1) != (schedule in SINGLE_STAGE) or (schedule in V_STYLE and per_rank != 2):
        wanted = "one stage" if schedule in SINGLE_STAGE else "two stages"
        yield Clash(f"{schedule} needs {wanted} a rank, and {given} {per_rank}")


@rule(PP, LISTED, "model.flavor", "model.n_layers")
def listed_stages_hold_the_model(case: Case) -> Verdicts:
    """Each module once, in the order of the forward pass."""
    parts, units = case.config.parallelism.module_fqns_per_model_part, stage_units(case.model)
    if case.degrees.pp == 1 or parts is None:
        return
    listed = [name for part in parts for name in part]
    unknown = [name for name in dict.fromkeys(listed) if name not in units]
    for name in unknown:
        yield Clash(f"the model has no module `{name}`", allowed=_shown(units), nearest=nearest(name, units))
    if missing := [unit for unit in units if unit not in listed]:
        yield Clash(f"no stage holds {_shown(missing)}", "list every module of the model")
    if doubled := [name for name, times in Counter(listed).items() if times > 1]:
        yield Clash(f"listed more than once: {_shown(doubled)}", "list every module once")
    if any(not part for part in parts):
        yield Clash("a stage without a module has nothing to compute", "remove it, or give it a module")
    if not (unknown or missing or doubled) and (late := _first_late(listed, units)) is not None:
        yield Clash(f"`{late[0]}` stands before `{late[1]}`, which comes earlier in the forward pass", _shown(units))


def _first_late(listed: list[str], units: tuple[str, ...]) -> tuple[str, str] | None:
    """The first two neighbours that stand the wrong way round."""
    return next(((one, other) for one, other in pairwise(listed) if units.index(one) > units.index(other)), None)


def _shown(names: list[str] | tuple[str, ...]) -> str:
    """At most seven of them."""
    return ", ".join(names if len(names) <= 7 else [*names[:3], "...", *names[-3:]])


@rule(PP, "model.flavor", "model.tie_embeddings")
def tied_ends_are_on_one_rank(case: Case) -> Verdicts:
    if case.degrees.pp > 1 and case.model.tie_embeddings:
        what = "the embedding matrix also makes the logits, and the two ends of a pipeline would each hold one"
        yield Clash(what, "set model.tie_embeddings = false, or cut the model otherwise")


@rule(LOCAL, MICROBATCH, PP)
def local_batch_divides_into_micro_batches(case: Case) -> Verdicts:
    rows, size = case.config.training.local_batch_size, case.config.parallelism.pipeline_parallel_microbatch_size
    if case.degrees.pp > 1 and rows % size:
        yield Clash("the pipeline's micro-batches must divide the local batch", divisor_hint(MICROBATCH, rows, size))


@rule("validation.local_batch_size", MICROBATCH, PP)
def validation_batch_divides_into_micro_batches(case: Case) -> Verdicts:
    rows, size = case.config.validation.local_batch_size, case.config.parallelism.pipeline_parallel_microbatch_size
    if case.degrees.pp > 1 and case.config.validation.enable and rows % size:
        fix = f"set validation.local_batch_size to a multiple of {size}"
        yield Clash("the pipeline's micro-batches must divide the validation batch, too", fix)


@rule(PP, PER_STAGE, SCHEDULE, LOCAL, MICROBATCH)
def pipeline_is_of_a_size_that_can_be_planned(case: Case) -> Verdicts:
    stages, count = stage_count(case), micro_batches(case)
    if case.degrees.pp > 1 and stages * count > STAGE_PASSES:
        what = f"{stages} stages x {count} micro-batches are more passes than a schedule here may have"
        size = case.config.training.local_batch_size // max(STAGE_PASSES // stages, 1) + 1
        fix = f"set {MICROBATCH} to {size} or more" if stages < STAGE_PASSES else f"lower {PP}"
        yield Clash(what, fix, f"at most {STAGE_PASSES}")


@rule(SCHEDULE, PP, LOCAL, MICROBATCH)
def micro_batches_fill_the_schedule(case: Case) -> Verdicts:
    parallelism, pp, count = case.config.parallelism, case.degrees.pp, micro_batches(case)
    schedule = parallelism.pipeline_parallel_schedule
    if pp == 1 or parallelism.pipeline_parallel_schedule_csv is not None:
        return
    least = {"1F1B": pp, "DualPipeV": 2 * pp}.get(schedule, 1)
    if count < least:
        fix = f"raise training.local_batch_size to {least * parallelism.pipeline_parallel_microbatch_size} or more"
        yield Clash(f"{schedule} over {pp} ranks needs at least {least} micro-batches, and there are {count}", fix)
    rounds = max(1, count // pp)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        yield Clash(f"{schedule} works in {rounds} equal rounds, and {count} micro-batches do not divide into them")


@rule(SCHEDULE, PP, CSV, "compile.enable")
def schedule_allows_compiling(case: Case) -> Verdicts:
    """torch finds modules that `torch.compile` wrapped, and not those that were compiled in place, as ours are."""
    compile, schedule = case.config.compile, splits_backward(case)
    if schedule is not None and compile.enable and "model" in compile.components:
        what = f"{schedule} splits the backward pass in two, which compiled blocks do not allow"
        yield Clash(what, "choose 1F1B or Interleaved1F1B, or compile the loss alone")


@rule(SCHEDULE, PP, CSV, "parallelism.fsdp_reshard_after_forward")
def split_backward_finds_the_weights(case: Case) -> Verdicts:
    """torch looks for the gathered weights where their shards are by then."""
    if case.config.parallelism.fsdp_reshard_after_forward == "always" and (schedule := splits_backward(case)):
        what = f"{schedule} computes gradients of weights when parameters freed after the forward pass are gone"
        yield Clash(what, "leave fsdp_reshard_after_forward at `default`, or choose 1F1B or Interleaved1F1B")
