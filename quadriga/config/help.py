"""The keys of the configuration on a terminal: by table, with values, defaults and meanings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from quadriga.config.keys import KEYS, Key, show
from quadriga.config.reference import documentation, tables
from quadriga.errors import Problem, UserError, nearest


def print_keys(words: Sequence[str] = ()) -> None:
    """Print every key, or those that all `words` lead to, on standard output. Raises UserError if there is none.

    A word leads to a key if it is its table, or part of its name or of its meaning.
    """
    console, told, found = Console(highlight=False), documentation(), False
    for name, about, keys in tables():
        asked = [key for key in keys if all(_asked(word.lower(), name, key, told[key.name]) for word in words)]
        if asked:
            found = True
            console.print(Text.assemble((f"[{name}]", "bold cyan"), f"  {about}\n"))
        for key in asked:
            values = f"  {key.allowed}; default {show(key.default)}"
            console.print(_indented(Text.assemble((f"--{key.name}", "green"), (values, "dim")), 2))
            console.print(_indented(Text(told[key.name]), 6))
        if asked:
            console.print()
    if not found:
        text = " ".join(words)
        raise UserError(Problem(text, "no key has this in its name or meaning", nearest=nearest(text, KEYS)))


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns), expand=False)


def _asked(word: str, table: str, key: Key, meaning: str) -> bool:
    return word.strip("[]") == table or word in key.name or word in meaning.lower()
