"""`quadriga keys [WORD]` and `quadriga schema`: explain the keys of the configuration, to users and to editors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quadriga.cli.arguments import Parser
from quadriga.config.reference import json_schema, print_keys
from quadriga.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    parser = Parser("keys", "Explain the keys of the configuration; with words, only those that match all of them.")
    parser.add_argument("words", nargs="*", help="a table (`checkpoint`), part of a key (`seq_len`), or any word")
    print_keys(parser.parse_args(argv).words)
    return EXIT_OK


def schema(argv: Sequence[str]) -> int:
    """`quadriga schema`: print the JSON Schema of the TOML files."""
    about = "Print a JSON Schema of the configuration, for completion and checks of TOML files in an editor."
    Parser("schema", about).parse_args(argv)
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return EXIT_OK
