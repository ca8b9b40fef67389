"""Prints the keys of the configuration: by table, with values, defaults and meanings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from quadriga.config.keys import KEYS, Key, format_toml
from quadriga.config.reference import documentation, tables
from quadriga.errors import Problem, UserError, nearest


def print_keys(words: Sequence[str] = ()) -> None:
    """Print all keys, or those that match all `words`, on standard output. Raises UserError if there is none.

    A word matches a key if it is the name of its table, or a part of its name or its meaning.
    """
    console, documented, found = Console(highlight=False), documentation(), False
    for name, about, keys in tables():
        matching = [
            key for key in keys if all(_matches(word.lower(), name, key, documented[key.name]) for word in words)
        ]
        if matching:
            found = True
            console.print(Text.assemble((f"[{name}]", "bold cyan"), f"  {about}\n"))
        for key in matching:
            values = f"  {key.allowed}; default {format_toml(key.default)}"
            console.print(_indented(Text.assemble((f"--{key.name}", "green"), (values, "dim")), 2))
            console.print(_indented(Text(documented[key.name]), 6))
        if matching:
            console.print()
    if not found:
        text = " ".join(words)
        raise UserError(Problem(text, "no key has this in its name or meaning", nearest=nearest(text, KEYS)))


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns), expand=False)


def _matches(word: str, table: str, key: Key, meaning: str) -> bool:
    return word.strip("[]") == table or word in key.name or word in meaning.lower()
