"""Templates of documents: `{title}\\n{text}` makes one text of two fields of a record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

TEMPLATES = "fields in braces, as {title}, and any text between them"
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_NOT_PLAIN = re.compile(r"[.\[\]!:]")


class Template(NamedTuple):
    """`names`: the fields, in order; one can occur several times. `literals`: the text before, between and after them,
    so one more than names."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def is_one_field(self) -> bool:
        """Whether a text is a field as it is."""
        return self.literals == ("", "")

    def join(self, texts: Sequence[str]) -> str:
        """The text. `texts`: of each name. Raises TypeError if one of them is not a string."""
        if self.is_one_field and isinstance(texts[0], str):
            return texts[0]
        pairs = zip(texts, self.literals[1:], strict=True)
        return self.literals[0] + "".join(chain.from_iterable(pairs))


class DocumentTemplate(NamedTuple):
    """How a document is made of the fields of a record. `prompt`: of the text before it, whose tokens are no labels."""

    text: Template
    prompt: Template | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are read."""
        return self.text.names if self.prompt is None else (*self.prompt.names, *self.text.names)

    @property
    def is_one_field(self) -> bool:
        """Whether a document is a field as it is."""
        return self.prompt is None and self.text.is_one_field

    def join(self, texts: Sequence[str]) -> tuple[str, int]:
        """The document, and how many characters of it are the prompt. `texts`: of each name. Raises TypeError if one of
        them is not a string."""
        if self.prompt is None:
            return self.text.join(texts), 0
        prompt = self.prompt.join(texts[: len(self.prompt.names)])
        return prompt + self.text.join(texts[len(self.prompt.names) :]), len(prompt)


def parse_template(text: str) -> Template:
    """The parts of a template. Raises ValueError with the reason why it is not one."""
    literals, names = [""], []
    for token in _TOKEN.finditer(text):
        name = token[1]
        if token[0] in ("{", "}"):
            what = f"the `{token[0]}` at character {token.start() + 1} belongs to no field"
            raise ValueError(f"{what}; for a brace in the text, write it twice")
        if name is None:
            literals[-1] += {"{{": "{", "}}": "}"}.get(token[0], token[0])
            continue
        if not name.strip() or _NOT_PLAIN.search(name):
            raise ValueError(f"`{token[0]}` is not the plain name of a field: parts and formats of fields are not read")
        names.append(name)
        literals.append("")
    if not names:
        raise ValueError("it names no field in braces")
    return Template(tuple(literals), tuple(names))
