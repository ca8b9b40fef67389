"""Where documents come from. A source is a row of shards; a shard is read from its beginning, record by record.

Reading a record is cheap and parsing it is not, so the two are apart: a stream that shares a shard with others, or
skips to where it stood, parses only the documents that it keeps. To add a source: a class with the members of `Source`,
one entry in `catalogue.open_source`, and the conformance test in `tests/unit/data/test_source_conformance.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from quadriga.data.files import File
from quadriga.data.layout import Anchor
from quadriga.errors import Problem, UserError

DocumentId = tuple[int, int, int]  # epoch, shard, number of the record: unique in a run, the same on every layout


class Document(NamedTuple):
    """A text, or one piece of a long text: the first piece gets the BOS token, the last one EOS."""

    text: str
    begins: bool = True
    ends: bool = True
    id: DocumentId = (0, 0, 0)  # streams give it


class Record(NamedTuple):
    """A document as it lies in its shard. `number` is a byte offset or a row: it names the place in an error."""

    shard: int
    number: int
    data: str | bytes | None  # None: a null, or more bytes than a document may have
    begins: bool = True
    ends: bool = True


class BadRecord(UserError):
    """One record that cannot be read, while its file can: what `training.dataloader.on_bad_record` may skip.

    The problem is made when it is asked for, since the number of a line takes a read of all lines before it.
    """

    def __init__(
        self, what: str, location: Callable[[], str], allowed: str | None = None, fix: str | None = None
    ) -> None:
        Exception.__init__(self, what)
        self.what = what
        self._make: Callable[[], Problem] = lambda: Problem(location(), what, allowed=allowed, fix=fix)

    def __getattr__(self, name: str) -> Any:
        if name != "problems":
            raise AttributeError(name)
        self.problems = (self._make(),)
        return self.problems

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        return UserError, self.problems


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
        """The document in a record. Raises BadRecord that names file and line; UserError where the file is at fault."""

    def format_location(self, shard: int, number: int) -> str:
        """Where a record lies, as a message says it: the file, and the line or row. May read the file up to there."""

    @property
    def files(self) -> Sequence[File]:
        """The files, where they are files of the user; else ()."""

    def file_of(self, shard: int) -> File:
        """The file that the shard is in, one of `files`."""

    def layout(self) -> dict[str, Any] | None:
        """How the files are cut into shards (`layout.layout_state`); None where there are none."""

    def anchor(self, shard: int) -> Anchor | None:
        """How to find the beginning of the shard after its file was mended; None where its number is enough."""

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        """Cut the files as the run that saved `layout()` did, also where they were mended in the meantime.

        `anchors`: by shard, of those that the run stood in."""
