"""`quadriga ccl-bench write | read`: write a run in the format of CCL-Bench's tools, or check any CCL-Bench card."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quadriga.analysis.ccl_bench.card import (
    Card,
    card_errors,
    card_file,
    field_value,
    layout_errors,
    model_flops_utilization,
    read_card,
    write_card,
)
from quadriga.analysis.ccl_bench.folder import (
    RankSummary,
    average_step_time,
    newest_traces,
    rank_files,
    read_rank_summary,
    unpack_traces,
    without_ends,
)
from quadriga.cli.arguments import Parser, bandwidth, rank_count, run_from_file
from quadriga.cli.ccl_card import CARD_NAME, CardOptions, build_card
from quadriga.cli.estimate import world_size_of
from quadriga.errors import EXIT_OK, Problem, UserError, printable, shortened
from quadriga.metrics.jsonl import Record, read_metrics
from quadriga.models.registry import catalogue
from quadriga.reading import read_json_object

ABOUT = (
    "`write RUN OUT` writes the newest traces of a run, unpacked and flat, with a workload card, in the format that "
    "CCL-Bench's tools read. `read FOLDER` prints a card and known mistakes in it, compared with the traces next to "
    "it. docs/ccl-bench.md explains each field."
)
SUMMARY_FIELDS = {
    "description": "description",
    "model": "workload.model.model_family",
    "phase": "workload.model.phase",
    "batch": "workload.data.batch_size",
    "sequence": "workload.data.seq_len",
    "devices": "workload.hardware.xpu_spec.total_count",
    "device": "workload.hardware.xpu_spec.model",
    "library": "Model-executor.communication_library.name",
}


def main(argv: Sequence[str]) -> int:
    parser = Parser("ccl-bench", ABOUT)
    parser.add_argument("action", choices=("write", "read"), help="the task")
    parser.add_argument("place", metavar="RUN|FOLDER", help="write: a run folder; read: a card, or its folder")
    parser.add_argument("out", metavar="OUT", nargs="?", help="write: a folder that does not exist yet, or is empty")
    parser.add_argument("--json", action="store_true", help="read: print card, step time and mistakes as one object")
    for name, about in CardOptions.ABOUT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"write: {about}")
    parser.add_argument(
        "--scale-out-gbps", type=bandwidth, metavar="N", help="write: network bandwidth, Gbit/s per device"
    )
    parser.add_argument(
        "--scale-up-gbps", type=bandwidth, metavar="N", help="write: bandwidth in a machine, the same unit"
    )
    parser.add_argument("--gpus-per-node", type=rank_count, help="write: devices of one machine (default: all)")
    options = parser.parse_args(argv)
    if options.action == "read":
        if options.out:
            raise UserError(Problem("OUT", "`read` writes nothing", options.out))
        return inspect_card(Path(options.place), options.json)
    if not options.out:
        raise UserError(Problem("OUT", "is missing: name the folder to write"))
    texts = {name: getattr(options, name) for name in CardOptions.ABOUT}
    given = CardOptions(options.scale_out_gbps, options.scale_up_gbps, options.gpus_per_node, texts)
    return export_run(Path(options.place), Path(options.out), given)


def export_run(folder: Path, out: Path, given: CardOptions) -> int:
    """Write a run's traces and card into `out`, and print its step time next to that of the run's own metrics."""
    run = run_from_file(str(folder / "config.toml"), world_size_of(folder))
    environment = read_json_object(folder / "environment.json", what="record of a run")
    last_step, packed = newest_traces(folder)
    absent = [rank for rank in range(run.spec.world_size) if rank not in packed]
    if absent:
        raise UserError(Problem("RUN", f"the newest traces are missing those of ranks {absent}", str(folder)))
    records = _records(folder)
    _make_empty_folder(out)
    traces = [read_rank_summary(rank, path) for rank, path in enumerate(unpack_traces(packed, out))]
    profiled = profiled_steps(traces[0], last_step)
    card = build_card(run, environment, given, profiled, records[-1] if records else None, collectives_by_axis(out))
    write_card(card, out / CARD_NAME)
    print(out / CARD_NAME)
    print("\n".join(_step_time_lines(traces, logged_step_time(records, without_ends(profiled)))))
    print("\n".join(_warnings(_card_mistakes(out, card, traces))))
    return EXIT_OK


def _make_empty_folder(out: Path) -> None:
    """Create an empty folder. Raises UserError if it has files, because the tools would read them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        full = any(out.iterdir())
    except OSError as error:
        raise UserError(Problem("OUT", f"the folder cannot be created: {error}", str(out))) from None
    if full:
        raise UserError(Problem("OUT", "the folder is not empty, and the tools would read its files", str(out)))


def collectives_by_axis(folder: Path) -> dict[str, Any]:
    """By axis: the backend that carries its bytes in the traces, bytes per step, and how it was recognized."""
    from quadriga.analysis.trace.analysis import analyse  # not needed to read a card

    found: dict[str, Any] = {}
    for row in analyse(folder)["collectives"]:
        about = {key: row[key] for key in ("collective", "backend", "bytes_a_step", "found_by")}
        found.setdefault(row["axis"], []).append(about)
    return found


def inspect_card(place: Path, as_json: bool) -> int:
    file = card_file(place)
    card = read_card(file)
    files = rank_files(place) if place.is_dir() else {}
    traces = [read_rank_summary(rank, path) for rank, path in sorted(files.items())]
    found = _card_mistakes(place, card, traces)
    seconds = average_step_time(traces)
    if as_json:
        summary = {
            "card": card,
            "avg_step_time_s": seconds,
            "mfu": model_flops_utilization(card, seconds),
            "mistakes": found,
        }
        print(json.dumps(_as_json(summary), indent=2, default=str, allow_nan=False))
        return EXIT_OK
    print(printable(file))
    for name, path in SUMMARY_FIELDS.items():
        text = field_value(card, path)
        print(f"  {name:<12} {'not given' if text is None else shortened(text, 200)}")
    reached = model_flops_utilization(card, seconds)
    print(
        f"  {'step':<12} " + (f"{seconds:.6g} s (avg_step_time)" if seconds else "not measurable: no trace with steps")
    )
    print(f"  {'mfu':<12} " + (f"{reached:.2%} from this card" if reached is not None else _why_no_mfu(seconds)))
    print("\n".join(_warnings(found)))
    return EXIT_OK


def _as_json(value: Any) -> Any:
    """The value with infinities and NaN, which YAML has and JSON has not, as text."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _why_no_mfu(seconds: float | None) -> str:
    return "not measurable: " + ("the card lacks a figure or a known device" if seconds else "no step time")


def _card_mistakes(place: Path, card: Card, traces: Sequence[RankSummary]) -> list[str]:
    sizes = [spec for family in catalogue().values() for spec in family.values()]
    embeddings = {spec.n_parameters: spec.vocab_size * spec.dim for spec in sizes}
    layout = layout_errors(place, card) if place.is_dir() else ()
    return [*card_errors(card, traces, embeddings), *layout]


def _warnings(found: Sequence[str]) -> Iterator[str]:
    yield f"\n{len(found)} warning{'' if len(found) == 1 else 's'}" if found else "\nno known mistake"
    yield from (f"  - {printable(line)}" for line in found)


def profiled_steps(trace: RankSummary, last_step: int) -> list[int]:
    """The steps of the run that a trace contains. The last of them is the number in its folder's name."""
    newest = max(trace.steps, default=0)
    return [last_step - newest + number for number in trace.steps]


def logged_step_time(records: Sequence[Record], steps: Sequence[int]) -> float | None:
    """Mean seconds per step in the run's metrics, over those of `steps` that logged lines cover; None if none is.

    A line covers the steps since the previous line of the same attempt.
    """
    total, covered = 0.0, 0
    for before, record in itertools.pairwise(records):
        window = range(before["step"] + 1, record["step"] + 1)
        if before["attempt"] == record["attempt"] and set(window) <= set(steps):
            total, covered = total + record["step_seconds"] * len(window), covered + len(window)
    return total / covered if covered else None


def _step_time_lines(traces: Sequence[RankSummary], own: float | None) -> Iterator[str]:
    seconds = average_step_time(traces)
    counted = len(without_ends(list(traces[0].steps)))
    if seconds is None:
        yield "avg_step_time: not measurable: the traces have no step annotations"
        return
    yield f"avg_step_time: {seconds:.6g} s, over {counted} steps of {len(traces)} ranks"
    if own is None:
        yield "metrics.jsonl: not measurable: no logged line covers only those steps (use metrics.log_freq = 1)"
    else:
        yield f"metrics.jsonl: {own:.6g} s for the same steps ({seconds / own - 1:+.2%})"


def _records(folder: Path) -> list[Record]:
    """The training records of a run; empty if it logged none."""
    path = folder / "metrics.jsonl"
    return read_metrics(path, required=("step_seconds",)) if path.exists() else []
