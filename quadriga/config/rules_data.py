"""Rules about the keys of data sets, as `training.token_format`, and the same in `[validation]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quadriga.config.assets import OPTIONAL_KEYS, foreign_key
from quadriga.config.keys import KEYS
from quadriga.config.rules import Conflict, Findings, RuleContext, config_value, rule
from quadriga.config.schema import TEXT_FIELD, TOKENS, TokenKeys
from quadriga.config.templates import TEMPLATES, parse_template

TOKENIZER = "model.hf_assets_path"


def token_keys_of(ctx: RuleContext, table: str) -> TokenKeys | None:
    """How the token files of a table are read; None if it reads none."""
    training, validation = ctx.config.training, ctx.config.validation
    if table == "training":
        return training.token_keys if training.dataset == TOKENS and not training.sources else None
    used = validation.enable and not validation.sets and validation.dataset == TOKENS
    return validation.token_keys(training) if used else None


def _belongs_to_data(table: str, name: str) -> Callable[[RuleContext], Findings]:
    key, dataset = f"{table}.{name}", f"{table}.dataset"

    def key_belongs_to_the_data(ctx: RuleContext) -> Findings:
        training, validation = ctx.config.training, ctx.config.validation
        used = not training.sources if table == "training" else validation.enable and not validation.sets
        found = foreign_key(config_value(ctx.config, dataset), name) if used else None
        if found and config_value(ctx.config, key) != KEYS[key].default:
            yield Conflict(found[0], foreign_key_fix(dataset, found[1], key))

    return key_belongs_to_the_data


def foreign_key_fix(dataset: str, fit: Sequence[str], key: str) -> str:
    """The remedy for a key that only the data sets `fit` have."""
    return f'set {dataset} = "{fit[0]}", or remove {key}' if len(fit) == 1 else f"remove {key}"


def template_conflict(template: str | None, field: str | None, key: str) -> Conflict | None:
    """Why a template is not possible. `key`: of the field that it replaces, for the message."""
    if template is None:
        return None
    if field not in (None, TEXT_FIELD):
        return Conflict(f"a template replaces {key}, and both are set", "remove one of them")
    return not_a_template(template)


def not_a_template(template: str | None) -> Conflict | None:
    """Why a text is no template."""
    if template is None:
        return None
    try:
        parse_template(template)
    except ValueError as error:
        return Conflict(str(error), allowed=TEMPLATES)
    return None


def _names_fields(table: str) -> Callable[[RuleContext], Findings]:
    template, field = f"{table}.dataset_template", f"{table}.dataset_text_field"

    def template_names_fields(ctx: RuleContext) -> Findings:
        used = not ctx.config.training.sources if table == "training" else ctx.config.validation.enable
        values = config_value(ctx.config, template), config_value(ctx.config, field)
        if used and (found := template_conflict(*values, "the field")) is not None:
            yield found

    return template_names_fields


def _prompt_names_fields(table: str) -> Callable[[RuleContext], Findings]:
    def prompt_names_fields(ctx: RuleContext) -> Findings:
        used = not ctx.config.training.sources if table == "training" else ctx.config.validation.enable
        if used and (found := not_a_template(config_value(ctx.config, f"{table}.dataset_prompt"))) is not None:
            yield found

    return prompt_names_fields


@rule("training.packing", "training.dataset", "training.sources")
def rows_of_one_record_are_text(ctx: RuleContext) -> Findings:
    training = ctx.config.training
    if training.packing == "pad" and any(each.dataset == TOKENS for each in training.sources or (training,)):
        what = "the windows of token files are cut without regard to documents, so a row is not one record"
        fix = 'set training.packing = "concat", and training.document_mask = true to separate documents'
        yield Conflict(what, fix)


def _needs_dtype(table: str) -> Callable[[RuleContext], Findings]:
    def raw_ids_have_a_type(ctx: RuleContext) -> Findings:
        keys = token_keys_of(ctx, table)
        if keys is not None and keys.format == "raw" and keys.dtype is None:
            fix = f'set {table}.token_dtype, for files of nanoGPT to "uint16"'
            yield Conflict("files without a header do not say which integers their ids are", fix)

    return raw_ids_have_a_type


def _eos_in_vocabulary(table: str) -> Callable[[RuleContext], Findings]:
    def eos_is_an_id_of_the_model(ctx: RuleContext) -> Findings:
        keys, rows = token_keys_of(ctx, table), ctx.model.vocab_size
        if keys is not None and keys.eos_id is not None and keys.eos_id >= rows:
            fix = "set the id that ends a document in the files, or the model of their tokenizer"
            yield Conflict(f"the model has no such id, its vocabulary has {rows:,}", fix)

    return eos_is_an_id_of_the_model


def _no_bad_records(table: str) -> Callable[[RuleContext], Findings]:
    key = f"{table}.dataloader.on_bad_record"

    def token_files_have_no_bad_records(ctx: RuleContext) -> Findings:
        if token_keys_of(ctx, table) is not None and config_value(ctx.config, key) == "skip":
            what = "token files have no records that could be skipped; what cannot be read stops the run"
            yield Conflict(what, f'set {key} = "stop"')

    return token_files_have_no_bad_records


for _table in ("training", "validation"):
    _dataset, _format = f"{_table}.dataset", f"{_table}.token_format"
    for _name in OPTIONAL_KEYS:
        if f"{_table}.{_name}" in KEYS:
            rule(f"{_table}.{_name}", _dataset)(_belongs_to_data(_table, _name))
    if f"{_table}.dataset_template" in KEYS:
        rule(f"{_table}.dataset_template", f"{_table}.dataset_text_field")(_names_fields(_table))
        rule(f"{_table}.dataset_prompt")(_prompt_names_fields(_table))
    rule(_format, f"{_table}.token_dtype", _dataset)(_needs_dtype(_table))
    rule(f"{_table}.token_eos_id", "model.flavor", "model.vocab_size")(_eos_in_vocabulary(_table))
    rule(f"{_table}.dataloader.on_bad_record", _dataset)(_no_bad_records(_table))
