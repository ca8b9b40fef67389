"""Elements of HTML and SVG. Text is escaped unless an element made it: names come from traces and may hold anything."""

from __future__ import annotations

import re
from html import escape

# Control characters but for tab and line feed, halves of a surrogate pair, and marks that turn the direction of text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is markup already. Made by `tag` and `join_markup` alone."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element. Of an attribute's name a last `_` falls off and others become `-`; one that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join_markup(*children)}</{name}>")


def join_markup(*children: str | None, by: str = "") -> Markup:
    """Children one after another: markup as it stands, any other text escaped, None left out."""
    shown = [child if isinstance(child, Markup) else _text(child) for child in children if child is not None]
    return Markup(by.join(shown))


def _attribute(value: object) -> str:
    """Coordinates to a hundredth of a unit: no eye sees more, and pages stay small."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _text(str(value))


def _text(value: str) -> str:
    """Escaped, and without what HTML does not allow and files cannot hold: control characters and lone surrogates."""
    return escape(UNSAFE.sub("\N{REPLACEMENT CHARACTER}", value))
