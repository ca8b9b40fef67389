"""A look through the data before the first step, so that what is wrong with it is said at the door and all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from quadriga import limits
from quadriga.data.sources import BadRecord, Document, Source
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError

WHOLE_BYTES = 1 << 26  # up to this size on disk every document is looked at ...
MOST_BYTES = 1 << 28  # of text: a compressed file may hold any number
SAMPLED_SHARDS = 64  # ... above it the head of so many shards; the rest when its turn comes
SAMPLED_RECORDS = 20
MOST_PROBLEMS = 10
BYTES_PER_TOKEN = 32  # no text worth training on has fewer tokens than one in so many bytes


@dataclass
class _Findings:
    documents: int = 0
    problems: list[Problem] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # kept while there are too few to be sure of one window
    text_bytes: int = 0
    bad: int = 0  # records that are left out
    first_bad: BadRecord | None = None  # whose line is counted only if it is shown


def survey(source: Source, tokenizer: Tokenizer, least_tokens: int, *, skip_bad: bool = False) -> None:
    """Raises UserError with the problems found, up to MOST_PROBLEMS, or if the tokens are fewer than `least_tokens`.

    With `skip_bad`, records that cannot be read are no problem, as long as some can.
    """
    if source.trusted:
        return
    whole = source.disk_bytes <= WHOLE_BYTES
    found = _scan(source, least_tokens, None if whole else SAMPLED_RECORDS, skip_bad)
    if found.problems:
        raise UserError(*found.problems)
    if found.first_bad and not found.documents:
        what = f"none of the {found.bad:,} records that were looked at can be read"
        raise UserError(Problem("dataset_path", what, fix="mend the data"), *found.first_bad.problems)
    if whole and found.text_bytes < least_tokens * BYTES_PER_TOKEN:
        tokens = _count_tokens(found, tokenizer)
        if tokens < least_tokens:
            what = f"{found.documents} documents hold {tokens} tokens, fewer than the {least_tokens} of one window"
            raise UserError(Problem("dataset_path", what, fix="add data, or lower seq_len"))


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
    """The documents of a shard that can be read; the others' problems go to `found`."""
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
    except UserError as error:
        found.problems += error.problems


def _count_tokens(found: _Findings, tokenizer: Tokenizer) -> int:
    marks = len({tokenizer.bos_id, tokenizer.eos_id} - {None})
    return sum(len(ids) for ids in tokenizer.encode_batch(found.texts)) + marks * found.documents
