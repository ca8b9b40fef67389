"""`quadriga train FILE` and `quadriga dry-run FILE`: what `run_train.sh` does, for an installed package."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quadriga.cli.arguments import Parser, rank_count


def main(argv: Sequence[str]) -> int:
    return launch("train", "Train from a TOML file on the ranks of this machine.", argv, {})


def dry_run(argv: Sequence[str]) -> int:
    about = "Check a TOML file and print what the run would be. Starts nothing, needs no GPU."
    return launch("dry-run", about, argv, {"DRY_RUN": "1"})


def launch(command: str, about: str, argv: Sequence[str], environ: dict[str, str]) -> int:
    """Start the launcher with a file, a number of ranks and keys. `environ` is added to the environment variables."""
    from quadriga.launch.supervisor import main as start

    parser = Parser(command, about + " Other arguments are keys: --section.key value (see `quadriga keys`).")
    parser.add_argument("file", help="the TOML file, also after --job.config_file")
    parser.add_argument("--ngpu", type=rank_count, help="ranks on this machine (default: NGPU, else 4)")
    if "--job.config_file" in argv:  # the file by its key, as torchtitan's trainer takes it
        argv = [word for word in argv if word != "--job.config_file"]
    known, keys = parser.parse_known_args(argv)
    ranks = {} if known.ngpu is None else {"NGPU": str(known.ngpu)}
    allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return start(["--job.config_file", known.file, *keys], {**allocator, **os.environ, **ranks, **environ})
