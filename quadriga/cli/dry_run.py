"""`quadriga dry-run FILE`: check a run without starting it."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.cli.train import launch


def main(argv: Sequence[str]) -> int:
    about = "Check a TOML file and print what the run would be. Starts nothing, needs no GPU."
    return launch("dry-run", about, argv, {"DRY_RUN": "1"})
