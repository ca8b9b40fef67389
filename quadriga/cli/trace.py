"""`quadriga trace FOLDER`: where the time of a profiled step was spent, and the traffic of its collectives."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, write_page
from quadriga.errors import EXIT_OK, printable, shortened

ABOUT = (
    "Read the profiler's traces of all ranks and report where a step's time was spent: compute, communication (and its "
    "exposed part), copies, waits for data or for the host. Then report, by mesh axis and collective, calls, bytes, "
    "start skew, transfer time and bandwidth. FOLDER is a run folder, a folder of traces (Quadriga's, torchtitan's or "
    "flat ones) or one file. docs/traces.md defines every figure."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("trace", ABOUT)
    parser.add_argument("folder", metavar="FOLDER", help="a run folder, a folder of traces, or one trace")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as one HTML page")
    parser.add_argument("--step", metavar="N", type=iteration, help="the traces of iteration_N; without it, the newest")
    options = parser.parse_args(argv)
    from quadriga.analysis.trace.analysis import analyse
    from quadriga.analysis.trace.report import format_trace

    found = analyse(Path(options.folder), options.step)
    if options.html is not None:
        from quadriga.analysis.trace.page import trace_page

        write_page(options.html, trace_page(found))
    print(json.dumps(found, indent=1) if options.json else "\n".join(map(printable, format_trace(found))))
    return EXIT_OK


def iteration(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not the number of an iteration (0 or more)")
    return int(text)
