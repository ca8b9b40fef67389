"""Checks the data before the first step, so that their problems are reported at startup and together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from quadriga import limits
from quadriga.config.schema import Fetching, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.files import PATH_KEY
from quadriga.data.sources import BadRecord, Document, Source
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError
from quadriga.units import plural

WHOLE_BYTES = 1 << 26  # up to this size on disk, every document is checked
MOST_BYTES = 1 << 28  # of text that is checked, because a compressed file can expand to any size
SAMPLED_SHARDS = 64  # of larger data, the beginnings of so many shards are checked; the rest is checked when it is read
SAMPLED_RECORDS = 20
MOST_PROBLEMS = 10
BYTES_PER_TOKEN = 32  # upper bound: training text has at least one token per so many bytes


@dataclass
class _Findings:
    documents: int = 0
    problems: list[Problem] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # kept while they might be too few for one window
    text_bytes: int = 0
    bad: int = 0  # records that are skipped
    first_bad: BadRecord | None = None  # its line number is computed only if it is shown


def open_surveyed(
    keys: TextKeys,
    tokenizer: Tokenizer,
    seq_len: int,
    dataloader: Fetching,
    *,
    endless: bool,
    streams: int = 1,
    sample: bool = True,
    fills_rows: bool = True,
) -> Source:
    """`open_source` after a survey, with the tokens of one window as the least. `endless`: for training. `sample`: also
    survey data of more than WHOLE_BYTES. `fills_rows`: False if a row has one record, which may be shorter."""
    source = open_source(keys, streams=streams)
    # A pass with overlap can end with a partial window; without overlap it gives only full windows.
    full = fills_rows and (endless or dataloader.window_overlap == 0)
    least = seq_len + 1 if full else 2
    if sample or source.disk_bytes <= WHOLE_BYTES:
        skip_bad = dataloader.on_bad_record == "skip"
        survey(source, tokenizer, least, skip_bad=skip_bad, key=f"{keys.table}.dataset_path", path=keys.path)
    return source


def survey(
    source: Source,
    tokenizer: Tokenizer,
    least_tokens: int,
    *,
    skip_bad: bool = False,
    key: str = PATH_KEY,
    path: str | None = None,
) -> None:
    """Raises UserError with up to MOST_PROBLEMS problems, or if there are fewer than `least_tokens` tokens.

    With `skip_bad`, unreadable records are allowed if some records can be read. `key` and `path` are for messages.
    """
    if source.trusted:
        return
    whole = source.disk_bytes <= WHOLE_BYTES
    found = _scan(source, least_tokens, None if whole else SAMPLED_RECORDS, skip_bad)
    if found.problems:
        raise UserError(*found.problems)
    if found.first_bad and not found.documents:
        what = f"none of the {found.bad:,} records that were checked can be read"
        raise UserError(Problem(key, what, path, fix="repair the data"), *found.first_bad.problems)
    if whole and found.text_bytes < least_tokens * BYTES_PER_TOKEN:
        tokens = _count_tokens(found, tokenizer)
        if tokens < least_tokens:
            there = f"{plural(found.documents, 'document')} with {plural(tokens, 'token')}"
            fix = f"add data, or lower {key.partition('.')[0]}.seq_len"
            raise UserError(Problem(key, f"{there}, fewer than the {least_tokens} of one window", path, fix=fix))


def _scan(source: Source, least_tokens: int, records: int | None, skip_bad: bool) -> _Findings:
    found = _Findings()
    stride = 1 if records is None else -(-source.shards // SAMPLED_SHARDS)
    for shard in range(0, source.shards, stride):
        for document in _readable(source, shard, records, found, skip_bad):
            found.documents += 1
            found.text_bytes += len(document.text)
            if found.text_bytes < least_tokens * BYTES_PER_TOKEN:
                found.texts.append(document.text)
        if len(found.problems) >= MOST_PROBLEMS or found.text_bytes > MOST_BYTES:
            break
    return found


def _readable(source: Source, shard: int, records: int | None, found: _Findings, skip_bad: bool) -> Iterator[Document]:
    """Yields the readable documents of a shard; adds the problems of the others to `found`."""
    try:
        for record in islice(source.read(shard), records):
            try:
                yield source.parse(record)
            except BadRecord as error:
                if skip_bad:
                    found.bad += 1
                    found.first_bad = found.first_bad or error
                    if found.bad > limits.BAD_RECORDS_IN_A_ROW:
                        return
                    continue
                found.problems += error.problems
                if len(found.problems) >= MOST_PROBLEMS:
                    return
            if found.text_bytes > MOST_BYTES:
                return
    except UserError as error:  # of a whole file, which can have several shards
        found.problems += [problem for problem in error.problems if problem not in found.problems]


def _count_tokens(found: _Findings, tokenizer: Tokenizer) -> int:
    marks = len({tokenizer.bos_id, tokenizer.eos_id} - {None})
    return sum(len(ids) for ids in tokenizer.encode_batch(found.texts)) + marks * found.documents
