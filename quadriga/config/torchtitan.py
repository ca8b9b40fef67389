"""Generates the tables of `docs/from-torchtitan.md`: what each key of torchtitan v0.2.2 means here.

`torchtitan_keys.toml` has every key of torchtitan's JobConfig with type and default. `torchtitan_rows.toml` says what
is the same, what differs, and what is printed about it. A start reads neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.config import legacy_keys
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.markdown import table
from quadriga.config.reference import documentation
from quadriga.reading import read_toml

BESIDE = Path(__file__).parent
PART = re.compile(r"(<!-- made by `quadriga docs`: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_NUMBERS = "nothing: it does not change the numbers of the training"


@dataclass(frozen=True)
class TitanKey:
    """A key of the release: its type as text, and its default as a TOML value."""

    type: str
    default: Any = None


@dataclass(frozen=True)
class KeyRow:
    """What a key means here. `torchtitan_rows.toml` explains each field. `example` and `refuses` are TOML."""

    same: str | None = None
    differs: str | None = None
    printed: str | None = None
    example: str = ""
    refused: str | None = None
    refuses: str = ""
    free: bool = False
    key: str = ""
    ranks: int = 1

    @property
    def meaning(self) -> str:
        if self.differs is not None:
            return f"**differs.** {self.differs}"
        return f"same. {self.same}" if self.same else "same"

    @property
    def printed_cell(self) -> str:
        """The cell with what is printed at the start."""
        parts = [f"notice: `{self.printed}`"] if self.printed else []
        parts += [f"refusal: `{self.refused}`"] if self.refused else []
        return "; ".join(parts) or (NO_NUMBERS if self.free else "")


def titan_keys() -> Mapping[str, TitanKey]:
    """Every key of the release, in its order."""
    return {name: TitanKey(**fields) for name, fields in read_toml(BESIDE / "torchtitan_keys.toml").items()}


def titan_rows() -> Mapping[str, KeyRow]:
    """The row of each key. A test finds keys that are listed twice, which a mapping cannot show."""
    rows = read_toml(BESIDE / "torchtitan_rows.toml")
    plain = {name: KeyRow(same="") for name in rows["same"]}
    return plain | {name: KeyRow(**fields) for name, fields in rows.items() if isinstance(fields, dict)}


def same_default(name: str, there: TitanKey) -> bool:
    """Whether a key has the default of the release. An empty text and none both switch an optional key off."""
    if name not in KEYS:
        return True
    here = KEYS[name].default
    here = list(here) if isinstance(here, tuple) else here
    return bool(here == there.default) or (KEYS[name].optional and not here and not there.default)


def regenerate(page: str) -> str:
    """`page` with its generated parts replaced. The text around them is written by hand."""
    made = {"keys": _keys, "ours": _ours, "older": _older}
    return PART.sub(lambda part: f"{part[1]}\n{made[part[2]]()}\n\n{part[3]}", page)


def _keys() -> str:
    """One Markdown table for each TOML table of the release, one row per key."""
    rows, sections = titan_rows(), dict[str, list[tuple[str, ...]]]()
    for name, there in titan_keys().items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append((f"`{key}`", *_cells(name, there, rows[name])))
    head = ("key", "default of v0.2.2", "meaning here", "printed", "key that decides")
    return "\n\n".join(f"### [{section}]\n\n{table(head, lines)}" for section, lines in sections.items())


def _cells(name: str, there: TitanKey, row: KeyRow) -> tuple[str, ...]:
    default = "" if same_default(name, there) else f" The default is `{format_toml(KEYS[name].default)}`."
    return f"`{format_toml(there.default)}`", f"{row.meaning}{default}", row.printed_cell, row.key


def _ours() -> str:
    documented, there = documentation(), titan_keys()
    ours = [name for name in KEYS if name not in there]
    lines = [(f"`{name}`", f"`{format_toml(KEYS[name].default)}`", documented[name]) for name in ours]
    return table(("key", "default", "meaning"), lines)


def _older() -> str:
    renamed = [(f"`{old}`", f"`{new}`", "a notice names the new key") for old, new in legacy_keys.RENAMED.items()]
    moved = [(f"`[{old}]`", f"`[{new}]`", "as above") for old, new in legacy_keys.MOVED_TABLES.items()]
    gone = [(f"`{key}`", "removed", f"accepted with a notice: {why}") for key, why in legacy_keys.REMOVED.items()]
    refused = [
        (f"`{key}`", "removed", f"accepted with a notice if off, else refused: {why}")
        for key, why in legacy_keys.REFUSED.items()
    ]
    return table(("key of an older release", "here", "printed"), [*renamed, *moved, *gone, *refused])
