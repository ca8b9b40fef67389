"""`quadriga goodput RUN`: the share of a run's time that was spent on training, and what the rest was spent on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from quadriga.cli.arguments import Parser
from quadriga.errors import EXIT_OK, Problem, UserError, printable, shortened
from quadriga.metrics.goodput import Attempt, Goodput, read_goodput
from quadriga.units import format_seconds, plural

ABOUT = (
    "Report how much of a run's time was spent on training, starting, saving or waiting for data, or was lost, from "
    "its first start to its last record. RUN is a run folder (job.dump_folder), also of a run in progress. With "
    "--json: one object; quadriga/metrics/goodput.py explains its keys."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("goodput", ABOUT)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    options = parser.parse_args(argv)
    found = read_goodput(options.run)
    if found is None:
        what = "the folder has no records of a run" if Path(options.run).is_dir() else "there is no such folder"
        raise UserError(Problem("RUN", what, options.run, allowed="a folder with events.jsonl or metrics.jsonl"))
    print(json.dumps(found.as_json(), indent=1) if options.json else "\n".join(map(printable, format_goodput(found))))
    return EXIT_OK


def format_goodput(found: Goodput) -> Iterator[str]:
    """The report as text lines."""
    attempts = found.attempts
    faults = sum(bool(attempt.faults) for attempt in attempts)
    figures = [plural(len(attempts), "start"), plural(faults, "fault"), plural(found.saves, "save")]
    yield f"step {attempts[-1].last_step:,} after {', '.join(figures)}"
    yield f"{_date(attempts[0].began)} to {_date(attempts[-1].last)}: {format_seconds(found.wall_seconds)}"
    yield ""
    for kind, (name, meaning) in _meanings(found).items():
        share = 100 * found.shares[kind]
        yield f"  {name:<16} {format_seconds(found.seconds[kind]):>8} {share:6.1f}%   {meaning}".rstrip()
    yield ""
    yield f"effective training time: {100 * found.shares['trained']:.1f}%"
    if found.idle_seconds:
        yield f"idle: {format_seconds(found.idle_seconds)} from a start that finished the run to the next; not counted"
    yield ""
    yield f"  {'start':<6} {'began':<19}  {'steps':<17}  ended"
    for attempt in attempts:
        yield f"  {attempt.attempt:<6} {_date(attempt.began)}  {_steps(attempt):<17}  {_ended(attempt)}"
    if found.notices:
        yield ""
        yield from (f"notice: {notice}" for notice in found.notices)


def _meanings(found: Goodput) -> dict[str, tuple[str, str]]:
    """By kind, in the order of the table: its name, and its meaning."""
    skipped = f", {found.skipped_steps:,} of them bad and skipped" if found.skipped_steps else ""
    kept = sum(attempt.kept_step - attempt.first_step for attempt in found.attempts)
    replayed = plural(found.replayed_steps, "step")
    return {
        "trained": ("trained", f"{plural(kept, 'step')} that count{skipped}"),
        "data_wait": ("waited for data", ""),
        "validated": ("validated", ""),
        "saved": ("saved", "that training waited for"),
        "started": ("started", "from the start of the process to the first step"),
        "lost": ("lost", f"{replayed} that a later start trained again" if found.replayed_steps else ""),
        "down": ("down", "from the last record to the next start" if len(found.attempts) > 1 else ""),
    }


def _steps(attempt: Attempt) -> str:
    return f"{attempt.first_step:,} to {attempt.last_step:,}" if attempt.ready is not None else "none"


def _ended(attempt: Attempt) -> str:
    lost = attempt.last_step - attempt.kept_step
    return shortened(attempt.ended, 200) + (f" ({plural(lost, 'step')} lost)" if lost else "")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
