"""Elements of HTML and SVG. Text is escaped unless an element made it: names come from traces and may hold anything."""

from __future__ import annotations

from html import escape

VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is markup already. Made by `tag` and `join` alone."""

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
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | None, by: str = "") -> Markup:
    """Children one after another: markup as it stands, any other text escaped, None left out."""
    shown = [child if isinstance(child, Markup) else escape(child) for child in children if child is not None]
    return Markup(by.join(shown))


def _attribute(value: object) -> str:
    """Coordinates to a hundredth of a unit: no eye sees more, and pages stay small."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(str(value))
