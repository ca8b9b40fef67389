"""Elements of a self-contained HTML page: no scripts, no requests, readable in print and without its pictures.

document("Where a step went", answer("It computed."), section("By rank", figure(picture, caption, numbers)))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from quadriga.analysis.pages.markup import Markup, join_markup, tag
from quadriga.analysis.pages.style import style_sheet

NO_REASON = "no reason was recorded"


def document(title: str, *parts: str | None, source: str | None = None) -> str:
    """The whole page. `source`: a line about the input."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        # No requests and no scripts, whatever text the names in the page have.
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    )
    top = (tag("h1", title), tag("p", source, class_="source") if source else None)
    body = tag("body", tag("main", join_markup(*top, *parts, by="\n")))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *parts: str | None) -> Markup:
    return tag("section", tag("h2", title), *parts)


def answer(*sentences: str) -> Markup:
    """The answer of a report. The first sentence is large."""
    return tag("div", *(tag("p", sentence) for sentence in sentences), class_="answer", role="note")


def warnings(lines: Sequence[str], title: str = "Warnings") -> Markup | None:
    if not lines:
        return None
    listed = tag("ul", *(tag("li", line) for line in lines))
    return tag("div", tag("strong", title), listed, class_="warnings", role="note")


def note(text: str) -> Markup:
    return tag("p", text, class_="note")


def not_measurable(why: str | None) -> Markup:
    """The text in place of a figure that could not be measured."""
    return tag("span", f"not measurable: {why or NO_REASON}", class_="missing")


def figure(picture: str, caption: str, numbers: str | None, legend: str | None = None) -> Markup:
    """A picture with its legend, its caption, and the table of its numbers."""
    return tag("figure", legend, tag("div", picture, class_="scroll"), tag("figcaption", caption), numbers)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str | None]],
    *,
    caption: str | None = None,
    text_columns: Collection[int] = (0,),
) -> Markup:
    """A table. `text_columns` (by index) are aligned to the left, columns of figures to the right.

    A cell that is None is shown as "not measurable"; `reasons` next to the table gives the reason.
    """
    head = tag("tr", *(tag("th", name, scope="col", class_=_side(i, text_columns)) for i, name in enumerate(header)))
    body = [tag("tr", *(_cell(cell, i, text_columns) for i, cell in enumerate(row))) for row in rows]
    caption_element = tag("caption", caption) if caption else None
    return tag("div", tag("table", caption_element, tag("thead", head), tag("tbody", *body)), class_="scroll")


def _cell(cell: str | None, column: int, text_columns: Collection[int]) -> Markup:
    if cell is None:
        return tag("td", tag("span", "not measurable", class_="missing"), class_=_side(column, text_columns))
    if column == 0:
        return tag("th", cell, scope="row", class_="left")
    return tag("td", cell, class_=_side(column, text_columns))


def _side(column: int, text_columns: Collection[int]) -> str | None:
    return "left" if column in text_columns else None


def reasons(figures: Mapping[str, str | None]) -> Markup | None:
    """One line with the reason for each figure that could not be measured; None if there are none."""
    if not figures:
        return None
    listed = (tag("li", f"{name}: ", not_measurable(why)) for name, why in figures.items())
    return tag("ul", *listed, class_="note")


def collapsible(title: str, content: str) -> Markup:
    """Content that is hidden until a click, and shown in print."""
    return tag("details", tag("summary", title), content)
