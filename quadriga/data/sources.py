"""Where documents come from. A source is a row of shards; a shard is read from its beginning, record by record.

Reading a record is cheap and parsing it is not, so the two are apart: a lane that shares a shard with others, or skips
to where it stood, parses only the documents that it keeps. To add a source: a class with the four members of `Source`,
one entry in `catalogue.open_source`, and the resume exam in `tests/unit/data/test_source_exam.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

DocumentId = tuple[int, int, int]  # epoch, shard, number of the record: unique in a run, the same on every layout


class Document(NamedTuple):
    """A text, or one piece of a long text: the first piece gets the BOS token, the last one EOS."""

    text: str
    begins: bool = True
    ends: bool = True
    id: DocumentId = (0, 0, 0)  # lanes give it


class Record(NamedTuple):
    """A document as it lies in its shard. `number` is a byte offset or a row: it names the place in an error."""

    shard: int
    number: int
    data: str | bytes | None
    begins: bool = True
    ends: bool = True


class Source(Protocol):
    """Shards of documents in a fixed order. Any thread may read any shard, each reader for itself."""

    @property
    def fingerprint(self) -> str:
        """Names the data in one word without `;`. Equal for equal data wherever it lies; checked by a resume."""

    @property
    def shards(self) -> int:
        """How many shards there are."""

    @property
    def trusted(self) -> bool:
        """True where a survey before the first step would be waste (our own corpus) or a download (the Hub)."""

    @property
    def disk_bytes(self) -> int:
        """The size on disk, which bounds what a survey reads; 0 where the source is trusted."""

    def read(self, shard: int) -> Iterator[Record]:
        """The shard's records, in order. Raises UserError where a file is broken."""

    def parse(self, record: Record) -> Document:
        """The document in a record. Raises UserError that names file and line."""
