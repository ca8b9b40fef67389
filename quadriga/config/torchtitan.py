"""What each key of torchtitan v0.2.2 means here: `docs/from-torchtitan.md`, made of two lists that stand beside this.

`torchtitan_keys.toml` holds every key of its JobConfig with type and default, as the package has them;
`torchtitan_rows.toml` what is the same, what differs, and what is said about it. Nothing here is read at a start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.config import legacy_keys
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.reference import documentation
from quadriga.reading import read_toml

RELEASE = "v0.2.2"
BESIDE = Path(__file__).parent
PART = re.compile(r"(<!-- made by `quadriga docs`: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_NUMBERS = "nothing: no number of the training depends on it"


@dataclass(frozen=True)
class TitanKey:
    """A key of the release: the type as it is written there, and the default as TOML would have it."""

    type: str
    default: Any = None


@dataclass(frozen=True)
class KeyRow:
    """What a key means here; `torchtitan_rows.toml` says what each field is. `example` and `refuses` are TOML."""

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
        """What is printed at the start, in a cell."""
        parts = [f"notice: `{self.printed}`"] if self.printed else []
        parts += [f"refusal: `{self.refused}`"] if self.refused else []
        return "; ".join(parts) or (NO_NUMBERS if self.free else "")


def titan_keys() -> Mapping[str, TitanKey]:
    """Every key of the release, in its order."""
    return {name: TitanKey(**table) for name, table in read_toml(BESIDE / "torchtitan_keys.toml").items()}


def titan_rows() -> Mapping[str, KeyRow]:
    """What is said of each key; a key that is said twice has no place in a mapping, and a test finds it."""
    table = read_toml(BESIDE / "torchtitan_rows.toml")
    plain = {name: KeyRow(same="") for name in table["same"]}
    return plain | {name: KeyRow(**fields) for name, fields in table.items() if isinstance(fields, dict)}


def added_keys() -> tuple[str, ...]:
    """The keys that the release does not have."""
    return tuple(read_toml(BESIDE / "torchtitan_rows.toml")["ours"])


def same_default(name: str, there: TitanKey) -> bool:
    """Whether a key has the default of the release; an empty text switches an optional key off, as none does."""
    if name not in KEYS:
        return True
    here = KEYS[name].default
    here = list(here) if isinstance(here, tuple) else here
    return bool(here == there.default) or (KEYS[name].optional and not here and not there.default)


def regenerate(page: str) -> str:
    """`page` with its generated parts written anew; what stands around them is written by hand."""
    made = {"keys": _keys, "ours": _ours, "older": _older}
    return PART.sub(lambda part: f"{part[1]}\n{made[part[2]]()}\n\n{part[3]}", page)


def _keys() -> str:
    """A table for each table of the release, a row a key."""
    rows, tables = titan_rows(), dict[str, list[tuple[str, ...]]]()
    for name, there in titan_keys().items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, []).append((f"`{key}`", *_cells(name, there, rows[name])))
    head = ("key", "default there", "here", "what is printed", "the key that decides")
    return "\n\n".join(f"### [{table}]\n\n{_table(head, lines)}" for table, lines in tables.items())


def _cells(name: str, there: TitanKey, row: KeyRow) -> tuple[str, ...]:
    default = "" if same_default(name, there) else f" The default is `{format_toml(KEYS[name].default)}`."
    return f"`{format_toml(there.default)}`", f"{row.meaning}{default}", row.printed_cell, row.key


def _ours() -> str:
    documented = documentation()
    lines = [(f"`{name}`", f"`{format_toml(KEYS[name].default)}`", documented[name]) for name in added_keys()]
    return _table(("key", "default", "meaning"), lines)


def _older() -> str:
    renamed = [(f"`{old}`", f"`{new}`", "a notice names the new key") for old, new in legacy_keys.RENAMED.items()]
    moved = [(f"`[{old}]`", f"`[{new}]`", "as above") for old, new in legacy_keys.MOVED_TABLES.items()]
    gone = [(f"`{key}`", "gone", f"accepted with a notice: {why}") for key, why in legacy_keys.REMOVED.items()]
    refused = [
        (f"`{key}`", "gone", f"accepted with a notice when off, else refused: {why}")
        for key, why in legacy_keys.REFUSED.items()
    ]
    return _table(("key of an older release", "here", "what is printed"), [*renamed, *moved, *gone, *refused])


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
