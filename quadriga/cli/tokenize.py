"""`quadriga tokenize SOURCE OUT`: tokenize data of any format into shards of token ids."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quadriga.cli.arguments import Parser, count
from quadriga.cli.progress import format_time_left, progress_shown
from quadriga.cli.sources import add_text_arguments, arguments_in_messages, data_named, text_keys
from quadriga.config.assets import TOKENIZER_LIBRARIES
from quadriga.config.schema import TOKENS
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.units import format_count, format_seconds, plural

if TYPE_CHECKING:
    from quadriga.data.shards import ShardManifest
    from quadriga.data.tokenize_run import TokenizeProgress

ABOUT = (
    "Tokenize data into shards, which train as `training.dataset = tokens` without a tokenizer. SOURCE is a file, a "
    "folder or a glob, or a data set without a path (builtin, c4). OUT is a new folder. The shards are the same for "
    "any number of workers. After a kill or Ctrl-C, the same command continues."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("tokenize", ABOUT)
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, a glob, or the name of a data set")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder of the shards, or of a job to continue")
    parser.add_argument(
        "--tokenizer", required=True, metavar="FOLDER", help="as model.hf_assets_path: a folder or file"
    )
    parser.add_argument("--dataset", metavar="NAME", help="text, jsonl, parquet, ...; by default by the names of files")
    parser.add_argument("--field", default="text", help="the field or column of the documents (default: text)")
    add_text_arguments(parser)
    parser.add_argument("--workers", type=count, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--shard-tokens", type=count, default=100_000_000, metavar="N", help="least ids of a shard (default: 100000000)"
    )
    parser.add_argument(
        "--on-bad-record", choices=("stop", "skip"), default="stop", help="what a record that cannot be read does"
    )
    parser.add_argument(
        "--library",
        choices=TOKENIZER_LIBRARIES,
        default=TOKENIZER_LIBRARIES[0],
        help="what encodes; fastokens is faster, and is refused if its ids differ",
    )
    chosen = parser.parse_args(argv)
    from quadriga.data.shards import MANIFEST, read_manifest
    from quadriga.data.tokenize_job import CONTINUE, TokenizeJob
    from quadriga.data.tokenize_run import tokenize_into
    from quadriga.launch.environment import usable_cores
    from quadriga.launch.supervisor import python_path

    folder = Path(chosen.source).expanduser()
    shards = (folder / MANIFEST).is_file() and read_manifest(folder) is not None
    if chosen.dataset == TOKENS or shards:
        where, value = ("SOURCE", chosen.source) if shards else ("--dataset", TOKENS)
        raise UserError(Problem(where, "these are token ids already", value, fix="train on them as they are"))
    environ = {**os.environ, "PYTHONPATH": python_path(os.environ), "PYTHONSAFEPATH": "1"}
    started = time.monotonic()
    with arguments_in_messages():
        dataset, path = data_named(chosen.source, chosen.dataset, lambda name: name != TOKENS)
        keys = text_keys(dataset, path, chosen)
        skip = chosen.on_bad_record == "skip"
        job = TokenizeJob(keys, chosen.tokenizer, skip, chosen.shard_tokens, chosen.library)
        try:
            with progress_shown("tokenize") as shown:

                def show(progress: TokenizeProgress) -> None:
                    share = progress.source_bytes / max(progress.total_bytes, 1)
                    notes = [f"skipped: {bad}" for bad in progress.bad]
                    shown(share, format_progress(progress, time.monotonic() - started), notes)

                manifest = tokenize_into(chosen.out, job, chosen.workers or usable_cores(), environ, show)
        except KeyboardInterrupt:
            print(f"quadriga: what is finished is kept in {printable(chosen.out)}; {CONTINUE}", file=sys.stderr)
            raise
    print(f"{printable(chosen.out)}: {_summary(manifest)}, in {format_seconds(time.monotonic() - started)}")
    return EXIT_OK


def _summary(manifest: ShardManifest) -> str:
    bad = f", {plural(manifest.bad_records, 'bad record')} skipped" if manifest.bad_records else ""
    parts = plural(manifest.ids, "id"), plural(manifest.documents, "document"), plural(len(manifest.shards), "shard")
    return f"{', '.join(parts)} of {manifest.dtype}{bad}"


def format_progress(progress: TokenizeProgress, seconds: float) -> str:
    """The share of the source that is done, tokens, tokens per second, and the time left."""
    share = progress.source_bytes / max(progress.total_bytes, 1)
    here = (progress.source_bytes - progress.kept_bytes) / max(progress.total_bytes - progress.kept_bytes, 1)
    left = format_time_left(seconds, here)
    speed = progress.ids / max(seconds, 1e-9)
    return f"{100 * share:.0f}%, {format_count(progress.ids)} tokens, {format_count(speed)} tokens/s{left}"
