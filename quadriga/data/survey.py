"""A look through the data before the first step, so that what is wrong with it is said at the door and all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from quadriga.data.sources import Document, Source
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError

WHOLE_BYTES = 1 << 26  # up to this size on disk every document is looked at ...
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


def survey(source: Source, tokenizer: Tokenizer, least_tokens: int) -> None:
    """Raises UserError with the problems found, up to MOST_PROBLEMS, or if the tokens are fewer than `least_tokens`."""
    if source.trusted:
        return
    whole = source.disk_bytes <= WHOLE_BYTES
    found = _look(source, least_tokens, None if whole else SAMPLED_RECORDS)
    if found.problems:
        raise UserError(*found.problems)
    if whole and found.text_bytes < least_tokens * BYTES_PER_TOKEN:
        tokens = _count_tokens(found, tokenizer)
        if tokens < least_tokens:
            what = f"{found.documents} documents hold {tokens} tokens, fewer than the {least_tokens} of one window"
            raise UserError(Problem("dataset_path", what, fix="add data, or lower seq_len"))


def _look(source: Source, least_tokens: int, records: int | None) -> _Findings:
    found = _Findings()
    stride = 1 if records is None else -(-source.shards // SAMPLED_SHARDS)
    for shard in range(0, source.shards, stride):
        for document in _readable(source, shard, records, found.problems):
            found.documents += 1
            found.text_bytes += len(document.text)
            if found.text_bytes < least_tokens * BYTES_PER_TOKEN:
                found.texts.append(document.text)
        if len(found.problems) >= MOST_PROBLEMS:
            break
    return found


def _readable(source: Source, shard: int, records: int | None, problems: list[Problem]) -> Iterator[Document]:
    """The documents of a shard that can be read; the others' problems go to `problems`."""
    try:
        for record in islice(source.read(shard), records):
            try:
                yield source.parse(record)
            except UserError as error:
                problems += error.problems
                if len(problems) >= MOST_PROBLEMS:
                    return
    except UserError as error:
        problems += error.problems


def _count_tokens(found: _Findings, tokenizer: Tokenizer) -> int:
    marks = len({tokenizer.bos_id, tokenizer.eos_id} - {None})
    return sum(len(ids) for ids in tokenizer.encode_batch(found.texts)) + marks * found.documents
