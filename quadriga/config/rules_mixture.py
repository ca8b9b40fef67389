"""Rules about mixtures: the tables [[training.sources]] and [[training.stages]]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from quadriga.config.assets import OPTIONAL_KEYS, foreign_key
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.rules import Conflict, Findings, RuleContext, config_value, join_sources, rule
from quadriga.config.rules_data import foreign_key_fix, not_a_template, template_conflict
from quadriga.config.schema import TOKENS, DataSource, TrainingSource
from quadriga.errors import Problem, nearest
from quadriga.limits import MIXTURE_SOURCES

SOURCES, STAGES = "training.sources", "training.stages"
SINGLE = tuple(DataSource.model_fields)
AMOUNTS = "weight, tokens or epochs"


@rule(SOURCES, *(f"training.{name}" for name in SINGLE))
def a_mixture_replaces_the_single_data_set(ctx: RuleContext) -> Findings:
    keys = [f"training.{name}" for name in SINGLE]
    given = [key for key in keys if config_value(ctx.config, key) != KEYS[key].default]
    if ctx.config.training.sources and given:
        what = "a run reads one data set or a mixture, and both are set"
        where, origin = " and ".join([SOURCES, *given]), ctx.origin
        source = join_sources(origin.get(key, "default") for key in (SOURCES, *given))
        yield Problem(where, what, source=source, fix=f"remove {' and '.join(given)}, or the sources")


@rule(SOURCES)
def sources_have_different_names(ctx: RuleContext) -> Findings:
    counts = Counter(source.title for source in ctx.config.training.sources)
    if counts.total() > MIXTURE_SOURCES:
        what, fix = f"there are {counts.total():,} sources", "join some of them, with a glob as their dataset_path"
        yield Problem(SOURCES, what, source=ctx.origin.get(SOURCES), allowed=f"at most {MIXTURE_SOURCES:,}", fix=fix)
    for name, count in counts.items():
        if count > 1:
            what, fix = f"{count} sources have the name {name}", "set the key name of each to another one"
            yield Problem(SOURCES, what, source=ctx.origin.get(SOURCES), fix=fix)


@rule(SOURCES)
def each_source_has_one_amount(ctx: RuleContext) -> Findings:
    sources, origin = ctx.config.training.sources, ctx.origin.get(SOURCES)
    for source in sources:
        if len(source.amounts) != 1:
            given = " and ".join(f"{name} = {format_toml(value)}" for name, value in source.amounts.items())
            what = f"{given} are set, and only one may be" if given else f"one of {AMOUNTS} must be set"
            yield Problem(source.table, what, source=origin, fix=f"keep one of {AMOUNTS}" if given else None)
    weighted = [source.title for source in sources if list(source.amounts) == ["weight"]]
    counted = [source.title for source in sources if source.amounts and source.title not in weighted]
    if weighted and counted:
        what = f"weight ({', '.join(weighted)}) cannot be added to tokens or epochs ({', '.join(counted)})"
        yield Problem(SOURCES, what, source=origin, fix="give all sources a weight, or none of them")
    if sources and len(weighted) == len(sources) and not any(source.weight for source in sources):
        yield Problem(SOURCES, "all weights are 0", source=origin, fix="set the weight of a source above 0")


@rule(SOURCES)
def epochs_need_a_known_size(ctx: RuleContext) -> Findings:
    for source in ctx.config.training.sources:
        if source.epochs is not None and source.dataset != TOKENS:
            what = f"the number of tokens of {source.dataset} is not known before it is tokenized"
            fix = f"set {source.table}.tokens, or write the source as token files"
            yield Problem(f"{source.table}.epochs", what, format_toml(source.epochs), ctx.origin.get(SOURCES), fix=fix)


@rule(SOURCES, "model.flavor", "model.vocab_size")
def sources_have_keys_of_their_kind(ctx: RuleContext) -> Findings:
    for source in ctx.config.training.sources:
        for name, what, fix in _wrong_keys(source, ctx.model.vocab_size):
            value = format_toml(getattr(source, name))
            yield Problem(f"{source.table}.{name}", what, value, ctx.origin.get(SOURCES), fix=fix)


def _wrong_keys(source: TrainingSource, rows: int) -> Iterator[tuple[str, str, str]]:
    """Key, problem and remedy of what the single data set of `[training]` would be refused for too."""
    for name in OPTIONAL_KEYS:
        found = foreign_key(source.dataset, name)
        if found and getattr(source, name) != TrainingSource.model_fields[name].default:
            yield name, found[0], foreign_key_fix("dataset", found[1], name)
    conflict = template_conflict(source.dataset_template, source.dataset_text_field, "dataset_text_field")
    if conflict is not None:
        yield "dataset_template", conflict.what, conflict.fix or f"write {conflict.allowed}"
    if (conflict := not_a_template(source.dataset_prompt)) is not None:
        yield "dataset_prompt", conflict.what, f"write {conflict.allowed}"
    if source.dataset != TOKENS:
        return
    if source.token_format == "raw" and source.token_dtype is None:
        fix = 'set token_dtype, for files of nanoGPT to "uint16"'
        yield "token_format", "files without a header do not say which integers their ids are", fix
    if source.token_eos_id is not None and source.token_eos_id >= rows:
        fix = "set the id that ends a document in the files, or the model of their tokenizer"
        yield "token_eos_id", f"the model has no such id, its vocabulary has {rows:,}", fix


@rule("training.dataloader.on_bad_record", SOURCES)
def only_texts_have_bad_records(ctx: RuleContext) -> Findings:
    training = ctx.config.training
    if training.sources and not training.reads_text and training.dataloader.on_bad_record == "skip":
        what = "token files have no records that could be skipped; what cannot be read stops the run"
        yield Conflict(what, 'set training.dataloader.on_bad_record = "stop"')


@rule(STAGES, SOURCES, "training.global_batch_size", "training.local_batch_size", "training.seq_len", "training.steps")
def stages_are_in_order(ctx: RuleContext) -> Findings:
    training = ctx.config.training
    if training.stages and not training.sources:
        fix = "add [[training.sources]], or remove the stages"
        yield Problem(STAGES, "there are no sources", source=ctx.origin.get(STAGES), fix=fix)
        return
    rows = training.global_batch_size
    rows = training.local_batch_size * ctx.degrees.batch if rows == -1 else rows
    before, origin = 0, ctx.origin.get(STAGES)
    for number, stage in enumerate(training.stages, 1):
        where = f"{STAGES}[{number}]"
        if (stage.from_step is None) == (stage.from_tokens is None):
            what = "exactly one of from_step and from_tokens must be set"
            yield Problem(where, what, source=origin, allowed="the first stage, with the sources' own weights, is at 0")
            continue
        first = stage.first_step(rows * training.seq_len)
        if first <= before:
            what = f"begins at step {first:,}, and the stage before it at step {before:,}"
            yield Problem(where, what, source=origin, fix="write the stages in their order, with a step between them")
        elif first >= training.steps:
            yield f"{where} begins at step {first:,}, and the run ends at step {training.steps:,}"
        before = max(first, before)


@rule(STAGES, SOURCES)
def stages_name_sources(ctx: RuleContext) -> Findings:
    sources, origin = ctx.config.training.sources, ctx.origin.get(STAGES)
    names = [source.title for source in sources]
    for number, stage in enumerate(ctx.config.training.stages if sources else (), 1):
        for name in stage.weights.keys() - set(names):
            where = f"{STAGES}[{number}].weights"
            yield Problem(where, "no source has this name", name, origin, ", ".join(names), nearest(name, names))
        if not any(stage.weights.values()):
            what, fix = "no source has a weight above 0", "give a weight to a source"
            yield Problem(f"{STAGES}[{number}].weights", what, source=origin, fix=fix)
    for source in sources:
        if source.weight == 0 and not any(stage.weights.get(source.title) for stage in ctx.config.training.stages):
            fix = "set its weight above 0, name it in a stage, or remove the source"
            yield Problem(f"{source.table}.weight", "no stage reads this source", "0", ctx.origin.get(SOURCES), fix=fix)
