"""`quadriga search FILE`: the layouts that fit on a number of devices, the fastest first."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, count, page_file, run_from_file, write_page
from quadriga.cli.estimate import add_estimate_arguments, measured_rates
from quadriga.config import Run, to_toml
from quadriga.errors import EXIT_FAULT, EXIT_OK, Problem, UserError, printable
from quadriga.hardware import device_named
from quadriga.planning.search import ERROR, Candidate, SearchResult, search
from quadriga.units import GIB, format_bytes


def main(argv: Sequence[str]) -> int:
    about = "Estimate every valid layout for a number of devices, and rank those that fit by predicted speed."
    parser = Parser("search", about + " Other arguments are keys: --section.key value (see `quadriga keys`).")
    add_estimate_arguments(parser)
    parser.add_argument("--target-global-batch", type=count, help="rows per step (default: those of the file)")
    parser.add_argument("--top", type=count, default=10, help="number of layouts to print (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", type=page_file, help="write the first layout as a TOML file for `quadriga train`")
    options, keys = parser.parse_known_args(argv)
    if options.ngpu is None or options.device is None:
        fix = "quadriga search FILE --ngpu 8 --device h100-80gb"
        raise UserError(Problem("--ngpu and --device", "a search needs both", fix=fix))
    run, device = run_from_file(options.file, options.ngpu, keys), device_named(options.device, "--device")
    refuse_fixed_stages(run)
    rates = measured_rates(options.calibrate, device)
    start = time.perf_counter()
    found = search(
        run,
        device,
        rates=rates,
        gpus_per_node=options.gpus_per_node,
        global_batch=options.target_global_batch,
        progress=SearchProgress(),
    )
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps([candidate_dict(each) for each in found.best[: options.top]], indent=2))
    else:
        print("\n".join(_table(found, options.top, seconds, calibrated=rates is not None)))
    if not found.best:
        print("Nothing fits. Use more or larger devices, or a smaller --target-global-batch.", file=sys.stderr)
        return EXIT_FAULT
    if options.write:
        _write(options.write, options.file, options.ngpu, [*keys, *found.best[0].variant.as_arguments()])
    return EXIT_OK


class SearchProgress:
    """Prints now and then how far a search is: thousands of devices have 100,000 candidates, for many minutes."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._due = time.monotonic() + seconds

    def __call__(self, tried: int, fitting: int) -> None:
        if time.monotonic() >= self._due:
            print(f"{tried:,} candidates so far, {fitting:,} of them fit", file=sys.stderr, flush=True)
            self._due += self._seconds


def refuse_fixed_stages(run: Run) -> None:
    """Refuse keys that fix the stages, because a search assigns the stages itself and keeps all other keys."""
    for name in ("pipeline_parallel_schedule_csv", "module_fqns_per_model_part", "pipeline_parallel_layers_per_stage"):
        if getattr(run.config.parallelism, name) is not None:
            fix = "remove it from the file"
            raise UserError(Problem(f"parallelism.{name}", "a search assigns the stages itself", fix=fix))


def _table(found: SearchResult, top: int, seconds: float, calibrated: bool) -> list[str]:
    label = "" if calibrated else " (uncalibrated: for ranking)"
    lines = [
        f"{found.tried:,} candidates in {seconds:.1f} s, {found.fitting:,} of them fit; the best of each layout:",
        "",
    ]
    lines.append(f"  {'tokens/s/device':>18}  {'step time':>9}  {'needed':>10}  layout{label}")
    for each in found.best[:top]:
        time_of_step = each.estimate.time
        assert time_of_step is not None
        needed = each.estimate.needed
        speed = f"{each.tokens_per_second:>18,.0f}  {time_of_step.total:>8.3f}s"
        lines.append(f"  {speed}  {format_bytes(needed):>10}  {each.name}")
    if len(found.best) > 1:
        lines += ["", explain_winner(found.best)]
    return lines


def explain_winner(best: Sequence[Candidate]) -> str:
    """One sentence that says why the first layout is faster than the second, or is preferred to it."""
    first, second = best[:2]
    one, other = first.estimate.time, second.estimate.time
    assert one is not None
    assert other is not None
    if (gain := second.tokens_per_second / first.tokens_per_second - 1) > 0:
        less = f"less than the error of an estimate ({ERROR:.0%})"
        kinds = f"{first.kinds} instead of {second.kinds} kinds of parallelism"
        return f"The second is {gain:.1%} faster, {less}; the first is simpler ({kinds})."
    names = {
        "compute": "computes less",
        "optimizer": "updates fewer parameters per rank",
        "communication": "waits less for communication",
        "bubble": "is idle less in the pipeline",
        "host": "waits less for the host",
    }
    gains = {words: getattr(other, name) - getattr(one, name) for name, words in names.items()}
    reason = max(gains, key=lambda words: gains[words])
    share = 1 - one.total / other.total
    if share < 0.002:
        return f"The first two are equally fast ({share:.1%} apart); the first {reason}."
    return f"The first is {share:.1%} faster than the next: it {reason} ({1000 * gains[reason]:.0f} ms per step)."


def candidate_dict(candidate: Candidate) -> dict[str, object]:
    found = candidate.estimate
    assert found.time is not None
    return {
        "name": candidate.name,
        "set": dict(candidate.variant.changes),
        "tokens_per_second_per_device": candidate.tokens_per_second,
        "step_time_s": found.time.total,
        "needed_gib": found.needed / GIB,
    }


def _write(path: Path, file: str, ranks: int, keys: Sequence[str]) -> None:
    """Write the first layout. It is read and checked again, so the file is what will be trained."""
    run = run_from_file(file, ranks, keys)
    write_page(path, to_toml(run.config))
    train = shlex.join(["quadriga", "train", str(path), "--ngpu", str(ranks)])
    print(printable(f"the first layout is in {path}: {train}"), file=sys.stderr)
