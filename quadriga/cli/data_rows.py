"""The rows of `quadriga data` as text lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quadriga.data.rows import RowPart
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import printable
from quadriga.units import plural

SHOWN = 160  # characters of a part of a row, without --full


def format_row(parts: Iterable[RowPart], tokenizer: Tokenizer | None, full: bool) -> Iterator[str]:
    """One part of a row after another: a line with the document, and one with its text or ids. Control characters are
    escaped."""
    for part in parts:
        name = "" if part.document is None else ":".join(map(str, part.document)) + "  "
        before, after = ("continued, " if part.continued else ""), (", continues" if part.continues else "")
        yield f"  {name}{part.location}  ({before}{plural(len(part.ids), 'id')}{after})"
        text = printable(_decoded(part.ids.tolist(), tokenizer))
        yield f"    | {text if full or len(text) <= SHOWN else text[:SHOWN] + ' ...'}"


def _decoded(ids: list[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    known = [each for each in ids if 0 <= each < tokenizer.vocab_size]
    text = tokenizer.decode(known)
    return text if len(known) == len(ids) else f"{text} ({len(ids) - len(known)} ids are not in the vocabulary)"
