"""Makes pages: templates of Jinja2, and elements of SVG. All text except `Markup` is escaped, because names from traces
may contain anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from quadriga.analysis.pages.style import DARK, LIGHT, ON_DARK, ON_LIGHT

# Control characters except tab and line feed, lone surrogates, and marks that change the direction of text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def html_text(value: object) -> str:
    """A value as text without characters that HTML or UTF-8 files cannot have. Markup is unchanged, None is empty."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(value))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    finalize=html_text,  # of each value, before it is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **values: Any) -> str:
    """The page of a template, by its path in `analysis`."""
    themes = {"light": (LIGHT, ON_LIGHT), "dark": (DARK, ON_DARK)}
    return TEMPLATES.get_template(template).render(themes=themes, **values)


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element. In names of attributes, a trailing `_` is removed and others become `-`. None omits an attribute."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{Markup('').join(map(html_text, children))}</{name}>")


def _attribute(value: object) -> str:
    """Coordinates with two decimals: more are not visible, and pages stay small."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(html_text(value))
