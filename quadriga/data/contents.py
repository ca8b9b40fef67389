"""How many documents and tokens there are in data, how long documents are, and which records are bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from quadriga.data.sources import BadRecord, Document, Source
from quadriga.data.streams import encode_documents, record_size
from quadriga.data.token_files import TokenFiles
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError
from quadriga.units import grouped

SAMPLED_BYTES = 1 << 23  # data of at most so many bytes are read in full; of larger ones, about so many characters
SAMPLED_SHARDS = 64
SAMPLED_IDS = 1 << 22
IDS_AT_ONCE = 1 << 20
GROUP_CHARACTERS = 1 << 18
MOST_PROBLEMS = 10


@dataclass
class Contents:
    """whole: everything was read. documents: that end in what was read. lengths: the number of documents by length in
    ids; the key k counts k to 2 k - 1, and 0 those without an id. problems: at most MOST_PROBLEMS. bad: how many
    records cannot be read."""

    whole: bool
    documents: int = 0
    tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    bad: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        new = [problem for problem in problems if problem not in self.problems]
        self.problems += new[: MOST_PROBLEMS - len(self.problems)]

    def add_document(self, length: int | None) -> None:
        """`length`: None if its beginning was not read."""
        self.documents += 1
        if length is not None:
            self.lengths[1 << (length.bit_length() - 1) if length else 0] += 1


def contents_of_text(source: Source, tokenizer: Tokenizer, *, whole: bool) -> Contents:
    """Reads the data, or unless `whole` a sample of large ones: the beginnings of some shards."""
    whole = whole or 0 < source.disk_bytes <= SAMPLED_BYTES
    found = Contents(whole)
    stride = 1 if whole else -(-source.shards // SAMPLED_SHARDS)
    characters = None if whole else SAMPLED_BYTES // min(source.shards, SAMPLED_SHARDS)
    length: int | None = None  # of the document that has begun
    for shard in range(0, source.shards, stride):
        documents = _documents(source, shard, characters, found)
        length = length if whole else None
        for group in grouped(documents, lambda each: len(each.text) + 1, GROUP_CHARACTERS):
            for document, (ids, _) in zip(group, encode_documents(group, tokenizer), strict=True):
                length = 0 if document.begins else length
                length = None if length is None else length + len(ids)
                found.tokens += len(ids)
                if document.ends:
                    found.add_document(length)
                    length = None
    return found


def _documents(source: Source, shard: int, characters: int | None, found: Contents) -> Iterator[Document]:
    """The documents of a shard, at least one, until they have so many characters."""
    read = 0
    try:
        for record in source.read(shard):
            try:
                document = source.parse(record)
            except BadRecord as error:
                found.bad += 1
                if len(found.problems) < MOST_PROBLEMS:
                    found.add_problems(error.problems)
                read += record_size(record)
            else:
                yield document
                read += len(document.text)
            if characters is not None and read >= characters:
                return
    except UserError as error:  # of the whole file
        found.add_problems(error.problems)


def contents_of_tokens(files: TokenFiles, vocab_size: int | None, *, whole: bool) -> Contents:
    """Reads the ids and where documents end; unless `whole`, only the first SAMPLED_IDS ids.

    `whole` also verifies every id against `vocab_size`, the indexes, and the hashes of shards."""
    most = files.length if whole else min(files.length, SAMPLED_IDS)
    found, before = Contents(most == files.length, tokens=most), 0
    try:
        for start in range(0, most, IDS_AT_ONCE):
            ends = files.borders(start, min(start + IDS_AT_ONCE, most)) + start
            for length in np.diff(ends, prepend=before).tolist():
                found.add_document(length)
            before = int(ends[-1]) if len(ends) else before
    except UserError as error:
        found.add_problems(error.problems)
    for problem in files.verify(vocab_size) if whole else ():
        found.add_problems([problem])
    return found
