"""Rules about validation: its sets, what it reads of them, and its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from quadriga.config.assets import BUILTIN_TOKENIZER, DATASETS, OPTIONAL_KEYS, foreign_key
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.rules import Conflict, Findings, RuleContext, config_value, join_sources, rule
from quadriga.config.rules_data import TOKENIZER, foreign_key_fix
from quadriga.config.rules_layout import CP, SEQ_LEN, TP, sequence_divides
from quadriga.config.rules_mixture import SINGLE, SOURCES
from quadriga.config.rules_pipeline import MICROBATCH, PP
from quadriga.config.schema import TOKENS, TextKeys, Training, ValidationSet
from quadriga.errors import Problem
from quadriga.limits import MIXTURE_SOURCES

SETS, WINDOWS, STEPS = "validation.sets", "validation.windows", "validation.steps"
VALIDATION_LEN, ROWS = "validation.seq_len", "validation.local_batch_size"


@rule(SETS, *(f"validation.{name}" for name in SINGLE))
def sets_replace_the_single_set(ctx: RuleContext) -> Findings:
    keys = [f"validation.{name}" for name in SINGLE]
    given = [key for key in keys if config_value(ctx.config, key) != KEYS[key].default]
    if ctx.config.validation.sets and given:
        what = "a validation reads one set or those of the tables, and both are set"
        source = join_sources(ctx.origin.get(key, "default") for key in (SETS, *given))
        fix = f"remove {' and '.join(given)}, or the tables"
        yield Problem(" and ".join([SETS, *given]), what, source=source, fix=fix)


@rule(SETS)
def sets_have_different_names(ctx: RuleContext) -> Findings:
    counts, origin = Counter(each.title for each in ctx.config.validation.sets), ctx.origin.get(SETS)
    if counts.total() > MIXTURE_SOURCES:
        what, fix = f"there are {counts.total():,} sets", "join some of them, with a glob as their dataset_path"
        yield Problem(SETS, what, source=origin, allowed=f"at most {MIXTURE_SOURCES:,}", fix=fix)
    for name, count in counts.items():
        if count > 1:
            what, fix = f"{count} sets have the name {name}", "set the key name of each to another one"
            yield Problem(SETS, what, source=origin, fix=fix)


@rule(SETS, "training.dataset", "training.token_format", "model.flavor", "model.vocab_size")
def sets_have_keys_of_their_kind(ctx: RuleContext) -> Findings:
    config, origin = ctx.config, ctx.origin.get(SETS)
    for each in config.validation.sets:
        for name, what, fix in _wrong_keys(each, config.training, ctx.model.vocab_size):
            yield Problem(f"{each.table}.{name}", what, format_toml(getattr(each, name)), origin, fix=fix)


def _wrong_keys(each: ValidationSet, training: Training, rows: int) -> Iterator[tuple[str, str, str]]:
    """Key, problem and remedy of what the single set would be refused for too."""
    for name in OPTIONAL_KEYS:
        found = foreign_key(each.dataset, name)
        if found and getattr(each, name) is not None:
            yield name, found[0], foreign_key_fix("dataset", found[1], name)
    if each.dataset != TOKENS:
        return
    keys = each.token_keys(training)
    if keys.format == "raw" and keys.dtype is None:
        fix = 'set token_dtype, for files of nanoGPT to "uint16"'
        yield "token_format", "files without a header do not say which integers their ids are", fix
    if keys.eos_id is not None and keys.eos_id >= rows:
        fix = "set the id that ends a document in the files, or the model of their tokenizer"
        yield "token_eos_id", f"the model has no such id, its vocabulary has {rows:,}", fix


@rule("validation.dataloader.on_bad_record", SETS)
def only_texts_of_sets_have_bad_records(ctx: RuleContext) -> Findings:
    section = ctx.config.validation
    only_tokens = bool(section.sets) and all(each.dataset == TOKENS for each in section.sets)
    if section.enable and only_tokens and section.dataloader.on_bad_record == "skip":
        what = "token files have no records that could be skipped; what cannot be read stops the run"
        yield Conflict(what, 'set validation.dataloader.on_bad_record = "stop"')


@rule(TOKENIZER, "training.dataset", "training.sources", "validation.dataset", SETS)
def validation_text_has_the_tokenizer_of_the_tokens(ctx: RuleContext) -> Findings:
    config = ctx.config
    if config.training.reads_text or not config.validation.enable or config.model.hf_assets_path != BUILTIN_TOKENIZER:
        return
    texts = [each for each in config.validation.read_sets if each.dataset != TOKENS and each.dataset in DATASETS]
    if texts:
        where = " and ".join(f"{each.table}.dataset = {format_toml(each.dataset)}" for each in texts)
        keys = (TOKENIZER, "training.dataset", SETS if config.validation.sets else "validation.dataset")
        source = join_sources(ctx.origin.get(key, "default") for key in keys)
        fix = f"set {TOKENIZER} to the tokenizer of the token files, or validate on token files"
        what = "the text of the validation needs the tokenizer that made the token files"
        yield Problem(f"{TOKENIZER} = {format_toml(BUILTIN_TOKENIZER)} and {where}", what, source=source, fix=fix)


@rule(WINDOWS, STEPS)
def a_validation_has_one_length(ctx: RuleContext) -> Findings:
    section = ctx.config.validation
    if section.steps is not None and section.windows != KEYS[WINDOWS].default:
        what = "both say how much a validation reads"
        yield Conflict(what, f"remove {STEPS} (on the command line: --{STEPS} none), or {WINDOWS}")


@rule(VALIDATION_LEN, TP, CP, "parallelism.context_parallel_load_balancer")
def validation_sequence_divides_over_ranks(ctx: RuleContext) -> Findings:
    """That of training is checked by itself."""
    section = ctx.config.validation
    if section.enable and section.seq_len is not None:
        yield from sequence_divides(ctx, VALIDATION_LEN, section.seq_len)


@rule(SEQ_LEN, VALIDATION_LEN)
def validation_sees_the_same_lengths(ctx: RuleContext) -> Findings:
    section, seq_len = ctx.config.validation, ctx.config.training.seq_len
    if section.enable and section.seq_len is not None and section.seq_len > seq_len:
        yield f"{VALIDATION_LEN} = {section.seq_len} is longer than {SEQ_LEN} = {seq_len}"


@rule(ROWS, MICROBATCH, PP)
def validation_batch_divides_into_micro_batches(ctx: RuleContext) -> Findings:
    """That of training is checked by itself."""
    section, size = ctx.config.validation, ctx.config.parallelism.pipeline_parallel_microbatch_size
    rows = section.local_batch_size
    if ctx.degrees.pp > 1 and section.enable and rows is not None and rows % size:
        fix = f"set {ROWS} to a multiple of {size}"
        yield Conflict("the pipeline's micro-batches must also divide the validation batch", fix)


@rule(SETS, "validation.dataset", "validation.dataset_path", "training.dataset", "training.dataset_path", SOURCES)
def held_out_sets_are_not_trained_on(ctx: RuleContext) -> Findings:
    """For example a data set of the Hub without a split."""
    training, section = ctx.config.training, ctx.config.validation
    trained = {_data_of(each.text_keys): each.table for each in training.sources or (training,)}
    for each in section.read_sets if section.enable else ():
        if (table := trained.get(_data_of(each.text_keys(training)))) is not None:
            yield f"{each.table} reads the same data as {table}, so its loss is not that of held-out text"


def _data_of(keys: TextKeys) -> tuple[str, ...]:
    return keys.dataset, keys.path or "", keys.config or "", keys.split or "train"
