"""`quadriga docs`: docs/configuration.md and every card of configs/, written anew or checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, repository_of
from quadriga.cli.card import card_of, make_card, order_for, put
from quadriga.config.reference import reference_page
from quadriga.errors import EXIT_FAULT, EXIT_OK


def main(argv: Sequence[str]) -> int:
    parser = Parser("docs", "Write docs/configuration.md and the cards in configs/ anew, from what they describe.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    check = parser.parse_args(argv).check
    root = repository_of(Path(__file__))
    stale = put(root / "docs" / "configuration.md", reference_page(), check)
    for file in sorted(root.glob("configs/*/*.toml")):
        stale |= put(card_of(file), make_card(order_for(file, None, None), file), check)
    return EXIT_FAULT if stale else EXIT_OK
