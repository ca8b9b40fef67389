"""`quadriga bench FILE --vary KEY=A,B`: run each setting several times, in alternating order, and compare them."""

from __future__ import annotations

import os
import signal
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.analysis.compare.differences import IGNORED_KEYS
from quadriga.analysis.compare.plan import (
    VARY,
    SettingChoice,
    bench_record,
    parse_choices,
    refuse_another_bench,
    run_order,
    write_bench_record,
)
from quadriga.analysis.compare.runs import (
    FEWEST_WINDOWS,
    Flat,
    config_table,
    counted_windows,
    flatten_tables,
    has_finished,
    is_run,
    predicted_records,
)
from quadriga.analysis.compare.statistics import FEWEST_PAIRS
from quadriga.cli.arguments import Parser, rank_count
from quadriga.cli.compare import add_compare_arguments, compare_folders, print_comparison
from quadriga.config import JobConfig, legacy_keys, to_toml
from quadriga.config.load import load
from quadriga.config.sources import command_line_layer
from quadriga.errors import EXIT_FAULT, EXIT_OK, Fault, Problem, UserError, shortened
from quadriga.launch.child import launch_environment, run_launch
from quadriga.launch.environment import launch_backend, read_launch_request, torch_build, visible_gpus
from quadriga.launch.supervisor import check_before_launch, training_problems
from quadriga.reading import read_toml
from quadriga.units import format_seconds

ABOUT = (
    "Run every combination of the varied values --repeat times, in alternating order (A B, B A, A B, ...), each as a "
    "full launch in its own folder, and compare them. If it is stopped, the same command continues it. Other arguments "
    "are keys for all runs: --section.key value (see `quadriga keys`)."
)
TAIL_LINES = 25
WINDOWS_WANTED = 20  # per run; metrics.log_freq is lowered for it
RESERVED_KEYS = {"job.dump_folder": "each run has its own folder", "debug.seed": "all runs have the same seed"}


@dataclass(frozen=True)
class Bench:
    """The plan of a bench. `arguments` are the keys of all runs, `configs` the configuration by number of setting."""

    file: str
    folder: Path
    choices: list[SettingChoice]
    arguments: list[str]
    ranks: int
    rounds: int
    environ: Mapping[str, str]
    configs: dict[int, Flat] = field(default_factory=dict)

    def run_folder(self, choice: SettingChoice, number: int) -> Path:
        return self.folder / choice.folder / f"repeat-{number}"

    def note(self) -> dict[str, Any]:
        return bench_record(self.choices, self.file, self.arguments, self.ranks)

    def argv(self, choice: SettingChoice, folder: Path) -> list[str]:
        values = [f"--{key}={value}" for key, value in choice.values.items()]
        return ["--job.config_file", self.file, *self.arguments, *values, f"--job.dump_folder={folder}"]


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench", ABOUT)
    parser.add_argument("file", help="the TOML file")
    parser.add_argument(VARY, action="append", required=True, metavar="KEY=A,B", help="a key and its values")
    parser.add_argument("--repeat", type=rank_count, default=5, help="runs of each setting (default 5)")
    parser.add_argument("--ngpu", type=rank_count, help="ranks on this machine (default: NGPU, else 4)")
    parser.add_argument("--steps", type=rank_count, help="steps of each run (default: those of the file)")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the runs (default: job.dump_folder with -bench)")
    add_compare_arguments(parser)
    options, keys = parser.parse_known_args(argv)
    bench = plan_bench(options, keys)
    write_bench_record(bench.folder, bench.note())
    try:
        run_all(bench)
    except KeyboardInterrupt:  # between two runs: during a run, the signal is forwarded to it
        raise Fault("interrupted; the same command continues from here", 128 + signal.SIGINT) from None
    print_comparison(compare_folders([bench.folder], (), options.warmup), options)
    return EXIT_OK


def plan_bench(options: Any, keys: Sequence[str]) -> Bench:
    """The plan, with all settings checked before the first run starts.

    Raises:
        UserError: a setting is wrong, or a finished run in the folder has another configuration.
    """
    environ = launch_environment(os.environ, options.ngpu)
    request, problems = read_launch_request(environ)
    if request.nodes > 1:
        problems.append(
            Problem("NNODES", "a bench runs on the ranks of one machine", str(request.nodes), "environment")
        )
    if problems:
        raise UserError(*problems)
    choices = parse_choices(options.vary)
    given_keys = check_reserved_keys(choices, keys, options.steps)
    user_arguments = [*keys, *([] if options.steps is None else [f"--training.steps={options.steps}"])]
    written = load(
        ["--job.config_file", options.file, *user_arguments], environ
    ).config  # its problems are reported by check_choice
    defaults = default_arguments(written, given_keys | choices[0].values.keys())
    folder = Path(options.out or f"{written.job.dump_folder.rstrip('/')}-bench")
    bench = Bench(options.file, folder, choices, [*defaults, *user_arguments], request.ranks, options.repeat, environ)
    refuse_another_bench(bench.folder, bench.note())
    for choice in choices:
        bench.configs[choice.number] = flatten_tables(tomllib.loads(to_toml(check_choice(bench, choice))))
        check_window_count(bench.configs[choice.number], options.warmup)
    check_finished_runs(bench)
    if bench.rounds < FEWEST_PAIRS:
        progress(f"notice: {bench.rounds} repeats are too few for an interval; {FEWEST_PAIRS} are needed, 5 are better")
    progress("keys set by the bench: " + " ".join(defaults))
    return bench


def check_reserved_keys(choices: Sequence[SettingChoice], keys: Sequence[str], steps: int | None) -> set[str]:
    """The names of the keys that the user gives to all runs."""
    entries, problems = command_line_layer(keys)
    names = (entry.key.replace(".no_", ".") for entry in entries)
    given_keys = {legacy_keys.renamed_key(name) or name for name in names}
    for key, why in RESERVED_KEYS.items():
        if key in choices[0].values or (key == "job.dump_folder" and key in given_keys):
            problems.append(Problem(key, f"cannot be set in a bench: {why}", source="command line"))
    for key in choices[0].values:
        if key in given_keys:
            problems.append(Problem(key, f"is varied and also set for all runs: keep only the {VARY}"))
    if steps is not None and "training.steps" in given_keys | choices[0].values.keys():
        problems.append(Problem("--steps", "training.steps is also set", str(steps), fix="keep one of them"))
    if problems:
        raise UserError(*problems)
    return given_keys


def default_arguments(config: JobConfig, given_keys: set[str]) -> list[str]:
    """Keys that a bench sets unless the user does: no saves, enough windows, and one trace at the end of each run."""
    steps, profiling = config.training.steps, config.profiling
    cycle = max(steps, profiling.profiler_warmup + profiling.profiler_active)
    defaults = {
        "checkpoint.enable": "false",
        "metrics.log_freq": str(max(1, min(config.metrics.log_freq, steps // WINDOWS_WANTED))),
        "profiling.enable_profiling": "true",
        "profiling.profile_freq": str(cycle),
    }
    return [f"--{key}={value}" for key, value in defaults.items() if key not in given_keys]


def check_choice(bench: Bench, choice: SettingChoice) -> JobConfig:
    """The resolved configuration of a setting. Raises UserError if this machine cannot run it."""
    argv = bench.argv(choice, bench.folder / choice.folder)
    try:
        request, run = check_before_launch(argv, bench.environ)
        backend, _ = launch_backend(run.spec.backend, request.ranks, torch_build(), visible_gpus(bench.environ))
        if lacking := training_problems(request, argv, bench.environ):
            raise UserError(*lacking)
    except UserError:
        progress(f"quadriga bench: {choice.name} cannot run here, so nothing is run")
        raise
    comm = run.config.comm.model_copy(update={"backend": backend})  # the launcher passes this backend to the ranks
    return run.config.model_copy(update={"comm": comm})


def check_window_count(config: Flat, warmup: int) -> None:
    steps, log_freq = config["training.steps"], config["metrics.log_freq"]
    windows, _ = counted_windows(predicted_records(steps, log_freq), config_table(config, "profiling"), steps, warmup)
    if len(windows) < FEWEST_WINDOWS:
        what = f"gives only {len(windows)} windows, with a record every {log_freq} steps and {warmup} steps of warm-up"
        raise UserError(Problem("training.steps", what, str(steps), fix="train longer: --steps, 30 or more"))


def check_finished_runs(bench: Bench) -> None:
    """Finished runs are kept, so each must have the configuration of its setting. Raises UserError otherwise."""
    for choice in bench.choices:
        wanted = bench.configs[choice.number]
        for number in range(1, bench.rounds + 1):
            folder = bench.run_folder(choice, number)
            if not has_finished(folder):
                continue
            found = flatten_tables(read_toml(folder / "config.toml", what="configuration of a run"))
            unlike = sorted(
                key
                for key in wanted.keys() | found.keys()
                if wanted.get(key) != found.get(key) and key not in IGNORED_KEYS
            )
            if unlike:
                key = unlike[0]
                values = f"was {shortened(found.get(key))}, is now {shortened(wanted.get(key))}"
                what = f"a finished run of another configuration: {shortened(key)} {values}"
                raise UserError(Problem("--out", what, str(folder), fix="choose another --out, or remove that folder"))


def run_all(bench: Bench) -> None:
    """Run all rounds, except finished runs. Raises Fault if a run fails or a signal ends the bench."""
    total, done, started = len(bench.choices) * bench.rounds, 0, time.monotonic()
    finished = 0
    for number, order in run_order(len(bench.choices), bench.rounds):
        for place in order:
            choice = bench.choices[place]
            folder = bench.run_folder(choice, number)
            done += 1
            label = f"run {done} of {total}: round {number}, {choice.name}"
            if has_finished(folder):
                progress(f"{label}: finished before")
                continue
            seconds = run_one(bench, choice, folder, label)
            finished += 1
            left = (time.monotonic() - started) / finished * (total - done)
            progress(f"{label}: {format_seconds(seconds)}" + (f", about {format_seconds(left)} left" if left else ""))


def run_one(bench: Bench, choice: SettingChoice, folder: Path, label: str) -> float:
    """Run one run to its end, and return its duration in seconds. The folder of an unfinished run is renamed."""
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(unused_path(folder))
    start = time.monotonic()
    code, ended_by = run_launch(bench.argv(choice, folder), bench.environ, log)
    if ended_by is not None:
        name = signal.Signals(ended_by).name
        raise Fault(f"{label}: ended by {name}; the same command continues from here", 128 + ended_by)
    if code != EXIT_OK or not is_run(folder):
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        hint = "correct the error and give the same command again: finished runs are kept"
        raise Fault(
            f"{label}: failed with exit code {code}\n\n{tail}\n\nThe whole output is in {log}. To do: {hint}",
            code if code > 0 else EXIT_FAULT,
        )
    return time.monotonic() - start


def unused_path(folder: Path) -> Path:
    numbers = range(1, 1000)
    names = (folder.with_name(f"{folder.name}-unfinished-{number}") for number in numbers)
    return next(path for path in names if not path.exists())


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
