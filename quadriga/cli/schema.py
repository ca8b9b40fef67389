"""`quadriga schema`: print the JSON Schema of the TOML files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quadriga.cli.arguments import Parser
from quadriga.config.reference import json_schema
from quadriga.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    about = "Print a JSON Schema of the configuration, for completion and checks of TOML files in an editor."
    Parser("schema", about).parse_args(argv)
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return EXIT_OK
