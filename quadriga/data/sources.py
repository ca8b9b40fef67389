"""The interface of data sources. A source is a sequence of shards. A shard is read from its start, record by record.

Reading a record is cheap and parsing it is expensive, so these are two methods: a stream that shares a shard with
others, or skips to its cursor, parses only the documents that it keeps. To add a source, write a class with the members
of `Source`, add it to `catalogue.open_source`, and to the conformance test
`tests/unit/data/test_source_conformance.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from quadriga import limits
from quadriga.config.schema import TEXT_FIELD, TextKeys
from quadriga.config.templates import TEMPLATES, DocumentTemplate, Template, parse_template
from quadriga.data.files import Cuts, File, fingerprint
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.units import format_some

MOST_NAMES = 8  # listed in a message
UNKNOWN_BYTES = 1 << 24  # counted for a shard whose size is not known
Cell = str | bytes | None  # what a field holds, if it can be a text
DocumentId = tuple[int, int, int]  # epoch, shard, number of the record: unique in a run, the same on every layout
DocumentName = tuple[str | int, ...]  # a DocumentId; in a mixture, the name of the source before it


def template_of(keys: TextKeys) -> DocumentTemplate:
    """How a document is made of the fields of a record. Raises UserError if a template is not one."""
    if keys.template is not None and keys.field != TEXT_FIELD:
        what = f"{keys.table}.dataset_text_field is set too, which it replaces"
        fix = "remove one of them"
        raise UserError(Problem(f"{keys.table}.dataset_template", what, keys.template, fix=fix))
    prompt = None if keys.prompt is None else _parsed(keys.prompt, f"{keys.table}.dataset_prompt")
    if keys.template is None:
        return DocumentTemplate(Template(("", ""), (keys.field,)), prompt)
    return DocumentTemplate(_parsed(keys.template, f"{keys.table}.dataset_template"), prompt)


def _parsed(template: str, where: str) -> Template:
    try:
        return parse_template(template)
    except ValueError as error:
        raise UserError(Problem(where, str(error), template, allowed=TEMPLATES)) from error


def fingerprint_suffix(keys: TextKeys) -> str:
    """How documents are made of records, as a part of the fingerprint of the data; empty for the default field."""
    prompt = "" if keys.prompt is None else f":prompt-{_digest(keys.prompt)}"
    if keys.template is not None:
        return f":template-{_digest(keys.template)}{prompt}"
    return prompt if keys.field == TEXT_FIELD else f":{keys.field.replace(';', '_')}{prompt}"


def _digest(template: str) -> str:
    return hashlib.blake2b(template.encode(), digest_size=8).hexdigest()


def format_names(names: Iterable[str]) -> str:
    """The existing fields, for a message."""
    return format_some([shortened(name, 40) for name in names], MOST_NAMES) or "none"


def field_fix(keys: TextKeys, names: Iterable[str]) -> str | None:
    """The remedy if the field is missing and others exist; None if there are no fields."""
    names = list(names)
    if not names:
        return None
    if keys.template is not None:
        return f"name existing fields in {keys.table}.dataset_template"
    likely = [name for name in ("text", "content", "document", "body", "raw_content", "code") if name in names]
    guess = likely[0] if likely else nearest(keys.field, names)
    named = f", here perhaps {shortened(guess, 40)}" if guess else ""
    return f"set {keys.table}.dataset_text_field to the field that holds the documents{named}"


class Document(NamedTuple):
    """A text, or one piece of a long text: the first piece gets the BOS token, the last one EOS. `prompt`: characters
    at its beginning whose tokens the loss does not count."""

    text: str
    begins: bool = True
    ends: bool = True
    id: DocumentId = (0, 0, 0)  # streams give it
    prompt: int = 0


class Record(NamedTuple):
    """A document as stored in its shard. `number`: a byte offset or a row; it locates the record in an error."""

    shard: int
    number: int
    data: Cell | tuple[Cell, ...]  # None: a null, or more bytes than the limit for a document
    begins: bool = True
    ends: bool = True


class BadRecord(UserError):
    """One unreadable record in a readable file: `training.dataloader.on_bad_record` can skip it.

    `problems` is computed on access, because the number of a line takes a read of all lines before it.
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


class Anchor(NamedTuple):
    """The first line of a shard: its first byte, and its CRC-32."""

    start: int
    checksum: int


class Source(Protocol):
    """Shards of documents in a fixed order. Any thread can read any shard; each call of `read` is independent."""

    @property
    def fingerprint(self) -> str:
        """Identifies the data: one word without `;`, equal for equal data in any place. A resume compares it."""

    @property
    def shards(self) -> int:
        """The number of shards."""

    @property
    def trusted(self) -> bool:
        """True if a survey before the first step is unnecessary (the built-in corpus) or a download (the Hub)."""

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, which limit what a survey reads; 0 if the source is trusted."""

    def read(self, shard: int) -> Iterator[Record]:
        """The shard's records, in order. Raises UserError if a file is damaged."""

    def parse(self, record: Record) -> Document:
        """The document in a record. Raises BadRecord with file and line; UserError if the whole file is unusable."""

    def format_location(self, shard: int, number: int) -> str:
        """The location of a record for a message: the file, and the line or row. May read the file up to there."""

    @property
    def files(self) -> Sequence[File]:
        """The files, if they are files of the user; else ()."""

    def file_of(self, shard: int) -> File:
        """The file of a shard, one of `files`. Raises LookupError if `files` is empty."""

    def bytes_of(self, shard: int) -> int:
        """About how many bytes on disk a shard has. Equal for equal data."""

    def layout(self) -> dict[str, Any] | None:
        """How the files are cut into shards (`files.layout_state`); None if `files` is empty."""

    def anchor(self, shard: int) -> Anchor | None:
        """Locates the beginning of the shard after its file was changed; None if its number is enough."""

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        """Cuts the files as the run that saved `layout()`, also if they changed since.

        `anchors`: by shard, of the partly read ones."""


class FileSource:
    """The part of `Source` that sources of the user's files share. `_spans`: by shard, its file, and where it begins
    and ends there, in bytes or rows. `_ends`: by file, the end of its last shard."""

    trusted = False

    def __init__(self, kind: str, files: Sequence[File], keys: TextKeys | None = None) -> None:
        """`keys`: None if a document is a whole file."""
        self.files = files
        self.disk_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint(kind, files) + (fingerprint_suffix(keys) if keys else "")

    def _cut(self, cuts: Cuts, ends: Iterable[int]) -> None:
        self._ends = list(ends)
        self._spans = [
            (index, start, end)
            for index, (starts, last) in enumerate(zip(cuts, self._ends, strict=True))
            for start, end in pairwise([*starts, last])
        ]
        self.shards = len(self._spans)

    def file_of(self, shard: int) -> File:
        return self.files[self._spans[shard][0]]

    def bytes_of(self, shard: int) -> int:
        index, start, end = self._spans[shard]
        last = self._ends[index]
        return self.files[index].size * (end - start) // last if last else 0

    def anchor(self, shard: int) -> Anchor | None:
        return None


class SourceWithoutFiles:
    """The same part, for sources that read no file of the user: there is none that could change."""

    trusted = True
    disk_bytes = 0
    files: tuple[File, ...] = ()

    def file_of(self, shard: int) -> File:
        raise LookupError("no file of the user")

    def bytes_of(self, shard: int) -> int:
        return UNKNOWN_BYTES

    def layout(self) -> None:
        return None

    def anchor(self, shard: int) -> None:
        return None

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        """Does nothing."""


def require_library(name: str, where: str, what: str) -> None:
    """Raises UserError if the library that reads such data (`what`) is not installed."""
    if find_spec(name) is None:
        raise UserError(Problem(where, f"{what} needs {name}, which is not installed", fix="pip install datasets"))


def too_long(source: Source, record: Record) -> BadRecord:
    what = f"the document is longer than the limit of {limits.DOCUMENT_BYTES:,} characters"
    return bad_record(source, record, what, fix="split the document")


def bad_record(
    source: Source, record: Record, what: str, allowed: str | None = None, fix: str | None = None
) -> BadRecord:
    return BadRecord(what, lambda: source.format_location(record.shard, record.number), allowed, fix)
