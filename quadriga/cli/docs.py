"""`quadriga docs`: generate docs/configuration.md, the tables of docs/from-torchtitan.md and the cards of configs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, repository_of
from quadriga.cli.card import card_path, make_card, target_for, write_or_check
from quadriga.config.reference import reference_page
from quadriga.config.torchtitan import regenerate
from quadriga.errors import EXIT_FAULT, EXIT_OK


def main(argv: Sequence[str]) -> int:
    parser = Parser("docs", "Generate docs/configuration.md, tables of docs/from-torchtitan.md and cards of configs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args(argv).check
    root = repository_of(Path(__file__))
    stale = write_or_check(root / "docs" / "configuration.md", reference_page(), check)
    page = root / "docs" / "from-torchtitan.md"
    stale |= write_or_check(page, regenerate(page.read_text(encoding="utf-8")), check)
    for file in sorted(root.glob("configs/*/*.toml")):
        stale |= write_or_check(card_path(file), make_card(target_for(file, None, None), file), check)
    return EXIT_FAULT if stale else EXIT_OK
