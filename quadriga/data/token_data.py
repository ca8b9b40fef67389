"""Token files as a run reads them: opened and checked before the first step, by the dry run and by every rank."""

from __future__ import annotations

from itertools import islice

from quadriga.config.schema import Dataloader, Fetching, TokenKeys
from quadriga.data.shards import MadeBy
from quadriga.data.token_files import TokenFiles, open_token_files
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError
from quadriga.units import plural

WHOLE_IDS = 1 << 24  # up to this number of ids, all are checked before the first step
MOST_PROBLEMS = 10


def open_tokens(
    keys: TokenKeys,
    dataloader: Fetching,
    seq_len: int,
    vocab_size: int | None,
    *,
    endless: bool = False,
    seed: int | str = 0,
    assets: str | None = None,
    document_mask: bool = False,
) -> tuple[TokenFiles, Windows]:
    """The token files of a data set, and their windows in the order in which they are read.

    vocab_size: of the model; None: the ids are not checked. endless: for training, shuffled by `seed` unless
    `dataloader.shuffle` is false. Otherwise for a pass in order. assets: the path of the run's tokenizer.
    document_mask: `training.document_mask`, which needs documents.

    Raises UserError: no files, files that cannot be read, or that another tokenizer made, fewer ids than one window,
    no documents although they are needed, or, in data of at most WHOLE_IDS, an id that the model does not have.
    """
    files = open_token_files(
        keys.path,
        token_format=keys.format,
        token_dtype=keys.dtype,
        eos_id=keys.eos_id,
        field=keys.field,
        key=keys.table,
    )
    if files.made_by is not None and assets is not None:
        _require_same_tokenizer(files.made_by, assets, keys)
    if document_mask and not files.separates_documents:
        what = "the files do not say where documents end, which training.document_mask needs"
        fix = f"set {keys.table}.token_eos_id to the id that ends a document, or training.document_mask = false"
        raise UserError(Problem(f"{keys.table}.dataset_path", what, keys.path, fix=fix))
    shuffled = endless and isinstance(dataloader, Dataloader) and dataloader.shuffle
    order = seed if shuffled else None
    windows = Windows(files.length, seq_len, dataloader.window_overlap, order, short_last=not endless)
    if not windows.count:
        there = f"{plural(files.length, 'id')}, fewer than the {windows.least_ids:,} of one window"
        fix = f"add data, or lower {keys.table.partition('.')[0]}.seq_len"
        raise UserError(Problem(f"{keys.table}.dataset_path", there, keys.path, fix=fix))
    checked = vocab_size is not None and files.length <= WHOLE_IDS
    if checked and (problems := list(islice(files.verify(vocab_size), MOST_PROBLEMS))):
        raise UserError(*problems)
    return files, windows


def _require_same_tokenizer(made_by: MadeBy, assets: str, keys: TokenKeys) -> None:
    if (fingerprint := build_tokenizer(assets).fingerprint) != made_by.fingerprint:
        what = f"is not the tokenizer of the shards in {keys.path}: {fingerprint} here, {made_by.fingerprint} there"
        fix = "set the tokenizer of the shards; or remove the key, and the run has no tokenizer"
        raise UserError(Problem("model.hf_assets_path", what, assets, fix=fix))


def format_tokens(files: TokenFiles, windows: Windows, slots: int) -> str:
    """What a run of `slots` rows reads: files, ids, windows of an epoch, and epochs."""
    there = f"{plural(len(files.files), 'file')}, {plural(files.length, 'id')}"
    return f"{there}, {plural(windows.count, 'window')} in an epoch, {slots / windows.count:.3g} epochs in this run"
