"""Whether each rank could read its data, and whether they are those of a checkpoint: the checks of the ranks, for the
dry run. No network is used: data of the Hub are not opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.config.assets import missing_files
from quadriga.config.run_spec import RunSpec
from quadriga.config.schema import Training, Validation
from quadriga.data.catalogue import C4_SPLITS, open_source
from quadriga.data.changes import data_changes
from quadriga.data.files import File
from quadriga.data.sources import Field
from quadriga.data.survey import open_surveyed
from quadriga.data.tokenizer import build_tokenizer
from quadriga.errors import Problem, UserError


def data_problems(training: Training, validation: Validation, spec: RunSpec) -> list[Problem]:
    """Why a rank would refuse the data. Data of more than `survey.WHOLE_BYTES` are only opened."""
    if spec.tokenizer.kind == "missing":
        return []

    problems = _survey(spec, training, spec.seq_len, Field(training.dataset_text_field))
    if validation.enable:
        name = validation.dataset_text_field or training.dataset_text_field
        problems += _survey(spec, validation, validation.seq_len, Field(name, "validation.dataset_text_field"))
    return problems


def _survey(spec: RunSpec, section: Training | Validation, seq_len: int, field: Field) -> list[Problem]:
    path = section.dataset_path
    if path is None or missing_files("", section.dataset, path, None):  # missing ones are reported elsewhere
        return []

    tokenizer, endless = build_tokenizer(spec.tokenizer.path), isinstance(section, Training)
    try:
        open_surveyed(
            section.dataset, path, tokenizer, seq_len, section.dataloader, endless=endless, field=field, sample=False
        )
    except UserError as error:
        return list(error.problems)
    return []


def changed_data(state: Mapping[str, Any], training: Training, spec: RunSpec) -> list[Problem]:
    """Why data and tokenizer are not those of `state`, which a checkpoint holds of its data loader. Of the built-in
    data and of the Hub only the kind is compared.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: `state` is not such a state.
    """

    parts = dict(part.split("=", 1) for part in state["fingerprint"].split("; "))
    tokenizer, path = build_tokenizer(spec.tokenizer.path), training.dataset_path
    files: Sequence[File] = ()
    if path is None:
        kind = "hub" if training.dataset in C4_SPLITS else "builtin"
        dataset = parts["dataset"] if parts["dataset"].startswith(f"{kind}:") else training.dataset
    else:
        source = open_source(training.dataset, path, field=Field(training.dataset_text_field))
        dataset, files = source.fingerprint, source.files
    here = {**parts, "dataset": dataset, "tokenizer": tokenizer.fingerprint}
    return data_changes(state, "; ".join(f"{key}={value}" for key, value in here.items()), files, tokenizer)
