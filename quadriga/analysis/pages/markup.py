"""Elements of HTML and SVG. All text except `Markup` is escaped, because names from traces may contain anything."""

from __future__ import annotations

import re
from html import escape

# Control characters except tab and line feed, lone surrogates, and marks that change the direction of text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is already markup. Only `tag` and `join_markup` create it."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element. In names of attributes, a trailing `_` is removed and others become `-`. None omits an attribute."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join_markup(*children)}</{name}>")


def join_markup(*children: str | None, by: str = "") -> Markup:
    """Children in order: markup unchanged, other text escaped, None omitted."""
    shown = [child if isinstance(child, Markup) else _text(child) for child in children if child is not None]
    return Markup(by.join(shown))


def _attribute(value: object) -> str:
    """Coordinates with two decimals: more are not visible, and pages stay small."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _text(str(value))


def _text(value: str) -> str:
    """Escaped text without characters that HTML or UTF-8 files cannot have: control characters, lone surrogates."""
    return escape(UNSAFE.sub("\N{REPLACEMENT CHARACTER}", value))
