"""`quadriga keys [WORD]`: explain the keys of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.cli.arguments import Parser
from quadriga.config.reference import print_keys
from quadriga.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    parser = Parser("keys", "Explain the keys of the configuration; with words, only those that match all of them.")
    parser.add_argument("words", nargs="*", help="a table (`checkpoint`), part of a key (`seq_len`), or any word")
    print_keys(parser.parse_args(argv).words)
    return EXIT_OK
