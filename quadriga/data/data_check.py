"""Whether each rank could read its data, and whether they are those of a checkpoint: the checks of the ranks, for the
dry run. No network is used: data of the Hub and at URLs are not opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quadriga.config.assets import HUB, is_remote, missing_files
from quadriga.config.mixing import format_mixture
from quadriga.config.run_spec import RunSpec
from quadriga.config.schema import TOKENS, DataSource, Fetching, HeldOut, TextKeys, Training, Validation
from quadriga.data.catalogue import C4_SPLITS, open_source
from quadriga.data.changes import SOURCES, data_changes, differences, fingerprint_parts, other_kind
from quadriga.data.files import File
from quadriga.data.hub import hub_fingerprint
from quadriga.data.mixture_data import MixtureData, open_mixture
from quadriga.data.survey import open_surveyed
from quadriga.data.token_data import format_tokens, open_tokens
from quadriga.data.token_files import TokenFiles
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError
from quadriga.units import plural

FORWARD_PARTS = 3  # a backward pass computes twice what a forward pass does


def data_problems(training: Training, validation: Validation, spec: RunSpec) -> list[Problem]:
    """Why a rank would refuse the data. Texts of more than `survey.WHOLE_BYTES` are only opened."""
    if spec.tokenizer.kind == "missing":
        return []

    if training.sources:
        problems = _mixture_problems(training, spec)
    elif training.dataset == TOKENS:
        problems = _problems_of(training, lambda: training_tokens(training, spec, spec.model.vocab_size))
    else:
        problems = _survey(spec, training, training.text_keys, spec.seq_len, training.dataloader, training.packing)
    if spec.validation is not None:
        dataloader, seq_len = validation.dataloader, spec.validation.seq_len
        for each in validation.read_sets:
            if each.dataset == TOKENS:
                opened = partial(held_out_tokens, each, training, dataloader, spec, spec.model.vocab_size)
                problems += _problems_of(each, opened)
            else:
                problems += _survey(spec, each, each.text_keys(training), seq_len, dataloader, training.packing)
    return problems


def held_out_tokens(
    each: HeldOut, training: Training, dataloader: Fetching, spec: RunSpec, vocab_size: int | None = None
) -> tuple[TokenFiles, Windows]:
    """The token files of a held-out set, and the windows of a pass. Raises UserError as `open_tokens`."""
    assert spec.validation is not None
    keys, assets = each.token_keys(training), spec.tokenizer.assets
    how: dict[str, Any] = {"assets": assets, "document_mask": training.document_mask}
    return open_tokens(keys, dataloader, spec.validation.seq_len, vocab_size, **how)


def _mixture_problems(training: Training, spec: RunSpec) -> list[Problem]:
    problems, sizes = [], (spec.seq_len, spec.model.vocab_size)
    for source in training.sources:
        if source.dataset == TOKENS:
            keys, assets = source.token_keys, spec.tokenizer.assets
            how: dict[str, Any] = {"assets": assets, "document_mask": training.document_mask}
            opened = partial(open_tokens, keys, training.dataloader, *sizes, endless=True, **how)
            problems += _problems_of(source, opened)
        else:
            problems += _survey(spec, source, source.text_keys, spec.seq_len, training.dataloader, training.packing)
    return problems


def _survey(
    spec: RunSpec, section: DataSource | HeldOut, keys: TextKeys, seq_len: int, dataloader: Fetching, packing: str
) -> list[Problem]:
    tokenizer, endless = build_tokenizer(spec.tokenizer.path), not isinstance(section, HeldOut)
    fills_rows = packing == "concat"
    opened = partial(open_surveyed, keys, tokenizer, seq_len, dataloader, endless=endless, fills_rows=fills_rows)
    return _problems_of(section, lambda: opened(sample=False))


def _problems_of(section: DataSource | HeldOut, open_data: Callable[[], object]) -> list[Problem]:
    """What opening the local data of a section raises. Missing ones are reported elsewhere."""
    if section.dataset_path is None or section.dataset == HUB or is_remote(section.dataset_path):
        return []
    if missing_files("", section.dataset, section.dataset_path, None):
        return []
    try:
        open_data()
    except UserError as error:
        return list(error.problems)
    return []


def training_tokens(training: Training, spec: RunSpec, vocab_size: int | None = None) -> tuple[TokenFiles, Windows]:
    """The token files of the training, and the windows of its epochs. Raises UserError as `open_tokens`."""
    keys, sizes, assets = training.token_keys, (spec.seq_len, vocab_size), spec.tokenizer.assets
    how: dict[str, Any] = {"seed": spec.seed, "assets": assets, "document_mask": training.document_mask}
    return open_tokens(keys, training.dataloader, *sizes, endless=True, **how)


def training_mixture(training: Training, spec: RunSpec) -> MixtureData:
    """The token files and shares of a mixture. Raises UserError as `open_mixture`."""
    sizes = {"seq_len": spec.seq_len, "global_batch_size": spec.global_batch_size}
    return open_mixture(training, seed=spec.seed, vocab_size=None, assets=spec.tokenizer.assets, **sizes)


def describe_data(training: Training, spec: RunSpec) -> list[str]:
    """The data, and for token files how much the run reads of them: one line, and for a mixture one for each source."""
    place = f"{training.dataset} from {training.dataset_path}" if training.dataset_path else training.dataset
    try:
        if training.sources:
            return training_mixture(training, spec).describe(spec.steps)
        if training.dataset == TOKENS:
            rows = spec.steps * spec.global_batch_size
            return [f"{place}: {format_tokens(*training_tokens(training, spec), rows)}"]
    except UserError:  # reported as a problem
        pass
    return [format_mixture(training) if training.sources else place]


def describe_validation(training: Training, validation: Validation, spec: RunSpec) -> list[str]:
    """What a validation reads, and what it costs: one line, and one for each of several sets. Nothing if it is off."""
    what, freq = spec.validation, validation.freq
    if what is None:
        return []
    described = [_describe_set(each, training, validation.dataloader, spec) for each in validation.read_sets]
    windows = "all windows" if what.windows is None else f"the first {plural(what.windows, 'window')}"
    reads = f"every {plural(freq, 'step')} {windows} of {what.seq_len:,} tokens"
    counts = [count for _, count in described if count is not None]
    if len(counts) == len(described):
        rows, batch = sum(counts), what.local_batch_size * spec.degrees.batch
        computed = sum(-(-count // batch) * batch for count in counts)  # a last batch is filled up
        share = computed * what.seq_len / (FORWARD_PARTS * freq * spec.tokens_per_step)
        several = " of each set" if validation.sets else ""
        reads += (
            f"{several}: at most {rows * what.seq_len:,} tokens, {100 * share:.2g} % of the computation between two"
        )
    if not validation.sets:
        return [f"{described[0][0]}: {reads}"]
    return [reads, *(f"{each.title}: {text}" for each, (text, _) in zip(validation.sets, described, strict=True))]


def _describe_set(each: HeldOut, training: Training, dataloader: Fetching, spec: RunSpec) -> tuple[str, int | None]:
    """The data of a held-out set, and the most windows that a validation reads of it; None if that is not known."""
    assert spec.validation is not None
    most = spec.validation.windows
    place = f"{each.dataset} from {each.dataset_path}" if each.dataset_path else each.dataset
    if each.dataset != TOKENS:
        return place, most
    try:
        files, windows = held_out_tokens(each, training, dataloader, spec)
    except UserError:  # reported as a problem
        return place, most
    there = f"{plural(len(files.files), 'file')}, {plural(files.length, 'id')}, {plural(windows.count, 'window')}"
    return f"{place}, {there}", windows.count if most is None else min(most, windows.count)


def changed_data(state: Mapping[str, Any], training: Training, spec: RunSpec) -> list[Problem]:
    """Why data and tokenizer are not those of `state`, which a checkpoint holds of its data loader. Of the built-in
    data and of the Hub only the kind is compared.

    Raises:
        UserError: token files cannot be read.
        LookupError, TypeError, ValueError, AttributeError: `state` is not such a state.
    """

    parts = fingerprint_parts(state["fingerprint"])
    if (SOURCES in parts) != bool(training.sources):
        return other_kind(state["fingerprint"], f"{SOURCES if training.sources else 'dataset'}=")
    if training.sources:
        return _changed_mixture(state, training, spec)
    if training.dataset == TOKENS:
        fingerprint = training_tokens(training, spec)[0].fingerprint
        here = {key: text for key, text in parts.items() if key != "tokenizer"} | {"dataset": fingerprint}
        return differences(state["fingerprint"], _joined(here))
    return _changed_rows(state, training, spec) + _changed_text(state, training.text_keys, spec)


def _changed_mixture(state: Mapping[str, Any], training: Training, spec: RunSpec) -> list[Problem]:
    data = training_mixture(training, spec)
    parts = fingerprint_parts(state["fingerprint"])
    texts = {source.title: parts.get(f"{source.title}: source", "") for source in data.texts}
    return data.differences(
        state,
        data.fingerprint(texts),
        lambda source, saved: _changed_text(saved, source.text_keys, spec),
    )


def _changed_rows(state: Mapping[str, Any], training: Training, spec: RunSpec) -> list[Problem]:
    """Whether the rows of text are made in another way."""
    parts = fingerprint_parts(state["fingerprint"])
    then = {str(key): parts[key] for key in ("packing", "seq_len") if key in parts}
    pads = training.packing != "concat"
    now: dict[str, str] = {"packing": training.packing, "seq_len": str(spec.seq_len)} if pads else {}
    return differences(_joined({"dataset": "", **then}), _joined({"dataset": "", **now}))


def _changed_text(state: Mapping[str, Any], keys: TextKeys, spec: RunSpec) -> list[Problem]:
    parts = fingerprint_parts(state["fingerprint"])
    tokenizer = build_tokenizer(spec.tokenizer.path)
    files: Sequence[File] = ()
    if keys.dataset == HUB:
        here_or_there = hub_fingerprint(keys, "\0").split("\0")
        same = parts["dataset"].startswith(here_or_there[0]) and parts["dataset"].endswith(here_or_there[1])
        dataset = parts["dataset"] if same else keys.dataset
    elif keys.path is not None and is_remote(keys.path):
        dataset = parts["dataset"] if parts["dataset"].startswith(f"{keys.dataset}:") else keys.dataset
    elif keys.path is None:
        kind = "hub" if keys.dataset in C4_SPLITS else "builtin"
        dataset = parts["dataset"] if parts["dataset"].startswith(f"{kind}:") else keys.dataset
    else:
        source = open_source(keys)
        dataset, files = source.fingerprint, source.files
    here = {**parts, "dataset": dataset, "tokenizer": tokenizer.fingerprint}
    return data_changes(state, _joined(here), files, tokenizer)


def _joined(parts: Mapping[str, str]) -> str:
    return "; ".join(f"{key}={value}" for key, value in parts.items())
