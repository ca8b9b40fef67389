"""`quadriga data fetch URL DIR`: copy files from an object store or a web server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quadriga.cli.arguments import Parser, count
from quadriga.cli.progress import format_time_left, progress_shown
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.units import format_bytes, format_seconds, plural

if TYPE_CHECKING:
    from quadriga.data.fetch import FetchProgress

ABOUT = (
    "Copy the files of a URL into a folder, for data that are read locally, such as token files. URL is a file, a "
    "folder or a glob of any file system of fsspec (s3://, gs://, ...), or a file of a web server (https://). After a "
    "kill or Ctrl-C, the same command continues. The size and SHA-256 of each file are in DIR/.fetch/manifest.jsonl; a "
    "later call copies what is missing, and refuses files that were changed here or at the URL."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("data fetch", ABOUT)
    parser.add_argument("url", metavar="URL", help="a file, a folder or a glob: s3://, gs://, https://, file://, ...")
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder to copy into; its other files are kept")
    parser.add_argument("--threads", type=count, default=4, metavar="N", help="files copied at a time (default: 4)")
    parser.add_argument("--verify", action="store_true", help="read what was copied before, and compare its SHA-256")
    try:
        chosen = parser.parse_args(argv)
    except UserError as error:
        if not os.path.isdir("fetch"):
            raise
        fix = "to report the data in the folder fetch: quadriga data ./fetch"
        raise UserError(*error.problems, Problem("quadriga data fetch", "is a command", fix=fix)) from error
    from quadriga.data.fetch import fetch_into
    from quadriga.data.tokenize_job import CONTINUE

    started = time.monotonic()
    try:
        with progress_shown("fetch") as shown:

            def show(progress: FetchProgress) -> None:
                share = progress.bytes / max(progress.total_bytes, progress.bytes, 1)
                shown(share, format_fetch_progress(progress, time.monotonic() - started), ())

            found = fetch_into(chosen.url, chosen.dir, chosen.threads, show, verify=chosen.verify)
    except KeyboardInterrupt:
        print(f"quadriga: what was copied is kept in {printable(chosen.dir)}; {CONTINUE}", file=sys.stderr)
        raise
    how = "verified" if chosen.verify else "unchanged"
    kept = f"; {plural(found.kept, 'file')} of earlier calls {how}" if found.kept else ""
    copied = f"{plural(found.copied, 'file')} copied{kept}; {format_bytes(found.bytes)} in all"
    print(f"{printable(chosen.dir)}: {copied}, in {format_seconds(time.monotonic() - started)}")
    return EXIT_OK


def format_fetch_progress(progress: FetchProgress, seconds: float) -> str:
    """Bytes and files that are there, bytes per second, and the time left."""
    left = max(progress.total_bytes - progress.bytes, 0)
    time_left = format_time_left(seconds, progress.received / max(progress.received + left, 1)) if left else ""
    there = f"{format_bytes(progress.bytes)} of {format_bytes(max(progress.total_bytes, progress.bytes))}"
    speed = format_bytes(progress.received / max(seconds, 1e-9))
    return f"{there}, {progress.finished:,} of {plural(progress.files, 'file')}, {speed}/s{time_left}"
