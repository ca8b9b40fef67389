"""Which field of a record is the document: `training.dataset_text_field`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quadriga.errors import nearest, shortened

DEFAULT = "text"
MOST_NAMES = 8  # listed in a message


@dataclass(frozen=True)
class Field:
    """`name`: the field. `key`: the configuration key that selects it, for messages."""

    name: str = DEFAULT
    key: str = "training.dataset_text_field"

    @property
    def fingerprint_suffix(self) -> str:
        """Appended to the fingerprint of the data; empty for the default field."""
        return "" if self.name == DEFAULT else f":{self.name.replace(';', '_')}"

    def format_names(self, names: Iterable[str]) -> str:
        """The existing fields, for a message."""
        names = [shortened(name, 40) for name in names]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return ", ".join(names[:MOST_NAMES]) + more or "none"

    def fix(self, names: Iterable[str]) -> str | None:
        """The remedy if this field is missing and others exist; None if there are no fields."""
        names = list(names)
        if not names:
            return None
        likely = [name for name in ("text", "content", "document", "body", "raw_content", "code") if name in names]
        guess = likely[0] if likely else nearest(self.name, names)
        named = f", here perhaps {shortened(guess, 40)}" if guess else ""
        return f"set {self.key} to the field that holds the documents{named}"


TEXT = Field()
