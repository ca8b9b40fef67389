"""Reads a page as a browser would: elements with their attributes and texts, and whether they are well nested."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    inner: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, name: str, class_: str | None = None) -> list[Element]:
        """Elements of a name within this one, in their order."""
        found = []
        for each in self.inner:
            if each.name == name and (class_ is None or class_ in each.attributes.get("class", "").split()):
                found.append(each)
            found += each.all(name, class_)
        return found

    @property
    def text(self) -> str:
        return "".join(self.texts)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inner.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)


def read_page(text: str) -> Element:
    """The document. Fails where elements are not well nested."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"left open: {[element.name for element in reader.open[1:]]}"
    return reader.root


def assert_page_rules(text: str) -> Element:
    """One file, no script, nothing fetched; every picture has a name, a caption and the table of its numbers."""
    page = read_page(text)
    assert not page.all("script")
    assert not [part for part in ("src=", "href=", "@import", "url(", "http://", "https://jfly") if part in text]
    assert page.all("html")[0].attributes["lang"] == "en"
    for picture in page.all("svg", "picture"):
        assert picture.attributes["role"] == "img"
        assert picture.inner[0].name == "title"
        assert picture.attributes["aria-label"] == picture.inner[0].text
    for figure in page.all("figure"):
        assert figure.all("figcaption")
        assert figure.all("table"), figure.text
    for table in page.all("table"):
        columns = len(table.all("thead")[0].all("th"))
        assert all(len(row.inner) == columns for row in table.all("tr")), "a row of another length"
    return page
