"""`quadriga estimate FILE`: estimate memory, communication and step time of a run, on any device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quadriga import limits
from quadriga.cli.arguments import Parser, count, rank_count, run_from_file
from quadriga.errors import EXIT_OK, Problem, UserError, shortened
from quadriga.hardware import DEVICES, Device, device_named
from quadriga.metrics.jsonl import read_metrics
from quadriga.planning.advice import advice_for
from quadriga.planning.calibrate import ProfiledStep, calibrate, newest_trace, seconds_a_step
from quadriga.planning.estimate import estimate
from quadriga.planning.rates import Rates
from quadriga.planning.report import format_estimate
from quadriga.reading import read_json_object


def main(argv: Sequence[str]) -> int:
    about = "Estimate the memory of each rank of a run, the bytes that it sends, and the step time. Needs no GPU."
    parser = Parser("estimate", about + " Other arguments are keys: --section.key value (see `quadriga keys`).")
    add_estimate_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON (docs/estimates.md explains its keys)")
    options, keys = parser.parse_known_args(argv)
    run = run_from_file(options.file, options.ngpu, keys)
    name = options.device or run.config.estimate.device
    device = device_named(name, "--device") if name else None
    found = estimate(run, device, measured_rates(options.calibrate, device), options.gpus_per_node)
    advice = advice_for(found)
    if options.json:
        print(json.dumps(found.to_dict([each.to_dict() for each in advice]), indent=2))
    else:
        print("\n".join(format_estimate(found, advice)))
    return EXIT_OK


def add_estimate_arguments(parser: Parser) -> None:
    parser.add_argument("file", help="the TOML file")
    parser.add_argument("--ngpu", type=rank_count, help="number of ranks (default: the product of the degrees)")
    known = ", ".join(device.slug for device in DEVICES)
    parser.add_argument("--device", help=f"{known}, or a TOML file with the figures of a device")
    parser.add_argument("--calibrate", metavar="RUN_FOLDER", help="use the rates of a finished run with a trace")
    parser.add_argument("--gpus-per-node", type=count, default=8, help="GPUs that share a fast link (default 8)")


def measured_rates(folder: str | None, device: Device | None) -> Rates | None:
    """The rates measured in the finished run in `folder`, which has its own configuration; None without a folder."""
    if folder is None:
        return None
    place = Path(folder)
    run = run_from_file(str(place / "config.toml"), world_size_of(place))
    records = read_metrics(place / "metrics.jsonl", required=("step_seconds",))
    measured = seconds_a_step(records, run.config.profiling, place)
    from quadriga.analysis.trace.busy import busy_seconds  # imports numpy, which other estimates do not need

    seconds = ProfiledStep(**busy_seconds(newest_trace(place)))
    return calibrate(place, run, device, seconds, measured)


def world_size_of(folder: Path) -> int:
    """The number of ranks of a run, from its `environment.json`. Raises UserError if that has none."""
    file = folder / "environment.json"
    ranks = read_json_object(file, what="record of a run").get("world_size")
    if type(ranks) is not int or not 1 <= ranks <= limits.RANKS:
        shown = shortened(repr(ranks))
        raise UserError(Problem(str(file), "world_size is not valid", shown, allowed=f"1 to {limits.RANKS:,}"))
    return ranks
