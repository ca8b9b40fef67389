"""Whether each rank could read its data, and whether they are those of a checkpoint: the checks of the ranks, for the
dry run. No network is used: data of the Hub are not opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quadriga.config.assets import missing_files
from quadriga.config.run_spec import RunSpec
from quadriga.config.schema import TOKENS, Training, Validation
from quadriga.data.catalogue import C4_SPLITS, open_source
from quadriga.data.changes import data_changes, differences
from quadriga.data.files import File
from quadriga.data.sources import Field
from quadriga.data.survey import open_surveyed
from quadriga.data.token_data import format_tokens, open_tokens
from quadriga.data.token_files import TokenFiles
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError


def data_problems(training: Training, validation: Validation, spec: RunSpec) -> list[Problem]:
    """Why a rank would refuse the data. Texts of more than `survey.WHOLE_BYTES` are only opened."""
    if spec.tokenizer.kind == "missing":
        return []

    if training.dataset == TOKENS:
        problems = _problems_of(training, lambda: training_tokens(training, spec, spec.model.vocab_size))
    else:
        problems = _survey(spec, training, spec.seq_len, Field(training.dataset_text_field))
    if validation.enable and validation.dataset == TOKENS:
        keys, sizes = validation.token_keys(training), (validation.seq_len, spec.model.vocab_size)
        assets = spec.tokenizer.assets
        problems += _problems_of(validation, lambda: open_tokens(keys, validation.dataloader, *sizes, assets=assets))
    elif validation.enable:
        name = validation.dataset_text_field or training.dataset_text_field
        problems += _survey(spec, validation, validation.seq_len, Field(name, "validation.dataset_text_field"))
    return problems


def _survey(spec: RunSpec, section: Training | Validation, seq_len: int, field: Field) -> list[Problem]:
    tokenizer, endless = build_tokenizer(spec.tokenizer.path), isinstance(section, Training)
    dataset, path = section.dataset, section.dataset_path
    return _problems_of(
        section,
        lambda: open_surveyed(
            dataset, path, tokenizer, seq_len, section.dataloader, endless=endless, field=field, sample=False
        ),
    )


def _problems_of(section: Training | Validation, open_data: Callable[[], object]) -> list[Problem]:
    """What opening the local data of a section raises. Missing ones are reported elsewhere."""
    if section.dataset_path is None or missing_files("", section.dataset, section.dataset_path, None):
        return []
    try:
        open_data()
    except UserError as error:
        return list(error.problems)
    return []


def training_tokens(training: Training, spec: RunSpec, vocab_size: int | None = None) -> tuple[TokenFiles, Windows]:
    """The token files of the training, and the windows of its epochs. Raises UserError as `open_tokens`."""
    keys, sizes, assets = training.token_keys, (spec.seq_len, vocab_size), spec.tokenizer.assets
    return open_tokens(keys, training.dataloader, *sizes, endless=True, seed=spec.seed, assets=assets)


def describe_data(training: Training, spec: RunSpec) -> str:
    """The data, and for token files how much the run reads of them."""
    place = f"{training.dataset} from {training.dataset_path}" if training.dataset_path else training.dataset
    if training.dataset != TOKENS:
        return place
    try:
        return f"{place}: {format_tokens(*training_tokens(training, spec), spec.steps * spec.global_batch_size)}"
    except UserError:  # reported as a problem
        return place


def changed_data(state: Mapping[str, Any], training: Training, spec: RunSpec) -> list[Problem]:
    """Why data and tokenizer are not those of `state`, which a checkpoint holds of its data loader. Of the built-in
    data and of the Hub only the kind is compared.

    Raises:
        UserError: token files cannot be read.
        LookupError, TypeError, ValueError, AttributeError: `state` is not such a state.
    """

    parts = dict(part.split("=", 1) for part in state["fingerprint"].split("; "))
    if training.dataset == TOKENS:
        fingerprint = training_tokens(training, spec)[0].fingerprint
        here = {key: text for key, text in parts.items() if key != "tokenizer"} | {"dataset": fingerprint}
        return differences(state["fingerprint"], _joined(here))
    tokenizer, path = build_tokenizer(spec.tokenizer.path), training.dataset_path
    files: Sequence[File] = ()
    if path is None:
        kind = "hub" if training.dataset in C4_SPLITS else "builtin"
        dataset = parts["dataset"] if parts["dataset"].startswith(f"{kind}:") else training.dataset
    else:
        source = open_source(training.dataset, path, field=Field(training.dataset_text_field))
        dataset, files = source.fingerprint, source.files
    here = {**parts, "dataset": dataset, "tokenizer": tokenizer.fingerprint}
    return data_changes(state, _joined(here), files, tokenizer)


def _joined(parts: Mapping[str, str]) -> str:
    return "; ".join(f"{key}={value}" for key, value in parts.items())
