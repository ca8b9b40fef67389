"""`quadriga bench FILE --vary KEY=A,B`: run each setting several times, in turns, and compare them."""

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

from quadriga.analysis.compare.differences import NO_MATTER
from quadriga.analysis.compare.plan import VARY, Choice, choices_of, leave_note, note_of, refuse_another_bench, turns
from quadriga.analysis.compare.runs import Flat, flatten, has_finished, is_run, table
from quadriga.analysis.compare.statistics import FEWEST_PAIRS
from quadriga.analysis.compare.windows import FEWEST_WINDOWS, counted, foreseen_records
from quadriga.cli.arguments import Parser, rank_count
from quadriga.cli.compare import add_arguments, compare_folders, show
from quadriga.config import JobConfig, to_toml, vocabulary
from quadriga.config.load import load
from quadriga.config.sources import command_line_layer
from quadriga.errors import EXIT_FAULT, EXIT_OK, Fault, Problem, UserError, shortened
from quadriga.launch.child import environment_of, run_launch
from quadriga.launch.environment import choose_backend, read_request, torch_build, visible_gpus
from quadriga.launch.supervisor import check_at_the_door, what_training_lacks
from quadriga.reading import read_toml
from quadriga.units import show_seconds

ABOUT = (
    "Run every combination of the varied values --repeat times, in turns (A B, B A, A B, ...), each run a real launch "
    "with a folder of its own, and compare them. The same command goes on where it was stopped. Further arguments are "
    "keys for all runs: --section.key value (see `quadriga keys`)."
)
TAIL_LINES = 25
WINDOWS_WANTED = 20  # in a run; the file's metrics.log_freq is lowered for it
TAKEN = {"job.dump_folder": "each run has a folder of its own", "debug.seed": "all runs have the same seed"}


@dataclass(frozen=True)
class Bench:
    """What is to be run: `arguments` are the keys of all runs, `configs` the configuration of each setting."""

    file: str
    folder: Path
    choices: list[Choice]
    arguments: list[str]
    ranks: int
    rounds: int
    environ: Mapping[str, str]
    configs: dict[int, Flat] = field(default_factory=dict)

    def run_folder(self, choice: Choice, number: int) -> Path:
        return self.folder / choice.folder / f"repeat-{number}"

    def note(self) -> dict[str, Any]:
        return note_of(self.choices, self.file, self.arguments, self.ranks)

    def argv(self, choice: Choice, folder: Path) -> list[str]:
        values = [f"--{key}={value}" for key, value in choice.values.items()]
        return ["--job.config_file", self.file, *self.arguments, *values, f"--job.dump_folder={folder}"]


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench", ABOUT)
    parser.add_argument("file", help="the TOML file")
    parser.add_argument(VARY, action="append", required=True, metavar="KEY=A,B", help="a key and its values")
    parser.add_argument("--repeat", type=rank_count, default=5, help="runs of each setting (default 5)")
    parser.add_argument("--ngpu", type=rank_count, help="ranks on this machine (default: NGPU, else 4)")
    parser.add_argument("--steps", type=rank_count, help="steps of each run (default: those of the file)")
    parser.add_argument("--out", metavar="FOLDER", help="where the runs go (default: job.dump_folder with -bench)")
    add_arguments(parser)
    options, keys = parser.parse_known_args(argv)
    bench = plan(options, keys)
    leave_note(bench.folder, bench.note())
    try:
        run_all(bench)
    except KeyboardInterrupt:  # between two runs: while one goes on, the signal is handed on to it
        raise Fault("interrupted; the same command goes on from here", 128 + signal.SIGINT) from None
    show(compare_folders([bench.folder], (), options.warmup), options)
    return EXIT_OK


def plan(options: Any, keys: Sequence[str]) -> Bench:
    """What will be run; all of it is checked here, before the first run starts.

    Raises:
        UserError: with what is wrong in a setting, or with finished runs of another configuration.
    """
    environ = environment_of(os.environ, options.ngpu)
    request, problems = read_request(environ)
    if request.nodes > 1:
        problems.append(
            Problem("NNODES", "a bench runs on the ranks of one machine", str(request.nodes), "environment")
        )
    if problems:
        raise UserError(*problems)
    choices = choices_of(options.vary)
    said = refuse_what_is_ours(choices, keys, options.steps)
    given = [*keys, *([] if options.steps is None else [f"--training.steps={options.steps}"])]
    written = load(["--job.config_file", options.file, *given], environ).config  # what is wrong in it is told below
    ours = own_arguments(written, said | choices[0].values.keys())
    folder = Path(options.out or f"{written.job.dump_folder.rstrip('/')}-bench")
    bench = Bench(options.file, folder, choices, [*ours, *given], request.ranks, options.repeat, environ)
    refuse_another_bench(bench.folder, bench.note())
    for choice in choices:
        bench.configs[choice.number] = flatten(tomllib.loads(to_toml(checked(bench, choice))))
        refuse_too_few_windows(bench.configs[choice.number], options.warmup)
    refuse_other_runs(bench)
    if bench.rounds < FEWEST_PAIRS:
        progress(
            f"notice: {bench.rounds} repeats are too few to tell a difference; {FEWEST_PAIRS} are needed, better 5"
        )
    progress("keys set by the bench: " + " ".join(ours))
    return bench


def refuse_what_is_ours(choices: Sequence[Choice], keys: Sequence[str], steps: int | None) -> set[str]:
    """The names of the keys that the user gives to all runs."""
    entries, problems = command_line_layer(keys)
    names = (entry.key.replace(".no_", ".") for entry in entries)
    said = {vocabulary.new_name(name) or name for name in names}
    for key, why in TAKEN.items():
        if key in choices[0].values or (key == "job.dump_folder" and key in said):
            problems.append(Problem(key, f"cannot be chosen here: {why}", source="command line"))
    for key in choices[0].values:
        if key in said:
            problems.append(Problem(key, f"is varied and given for all runs too: keep the {VARY} alone"))
    if steps is not None and "training.steps" in said | choices[0].values.keys():
        problems.append(Problem("--steps", "training.steps is given too", str(steps), fix="keep one of them"))
    if problems:
        raise UserError(*problems)
    return said


def own_arguments(config: JobConfig, said: set[str]) -> list[str]:
    """What a bench sets unless the user does: no saves, enough windows, and one trace at the end of each run."""
    steps, profiling = config.training.steps, config.profiling
    cycle = max(steps, profiling.profiler_warmup + profiling.profiler_active)
    ours = {
        "checkpoint.enable": "false",
        "metrics.log_freq": str(max(1, min(config.metrics.log_freq, steps // WINDOWS_WANTED))),
        "profiling.enable_profiling": "true",
        "profiling.profile_freq": str(cycle),
    }
    return [f"--{key}={value}" for key, value in ours.items() if key not in said]


def checked(bench: Bench, choice: Choice) -> JobConfig:
    """The configuration of a setting as its runs will leave it. Raises UserError where this machine cannot run it."""
    argv = bench.argv(choice, bench.folder / choice.folder)
    try:
        request, run = check_at_the_door(argv, bench.environ)
        backend, _ = choose_backend(run.spec.backend, request.ranks, torch_build(), visible_gpus(bench.environ))
        if lacking := what_training_lacks(request, argv, bench.environ):
            raise UserError(*lacking)
    except UserError:
        progress(f"quadriga bench: {choice.name} cannot be run here, so nothing is")
        raise
    comm = run.config.comm.model_copy(update={"backend": backend})  # as the launcher hands it to the ranks
    return run.config.model_copy(update={"comm": comm})


def refuse_too_few_windows(config: Flat, warmup: int) -> None:
    steps, log_freq = config["training.steps"], config["metrics.log_freq"]
    windows, _ = counted(foreseen_records(steps, log_freq), table(config, "profiling"), steps, warmup)
    if len(windows) < FEWEST_WINDOWS:
        what = f"leaves {len(windows)} windows to time, with a record every {log_freq} steps and {warmup} of warm-up"
        raise UserError(Problem("training.steps", what, str(steps), fix="train longer: --steps, 30 or more"))


def refuse_other_runs(bench: Bench) -> None:
    """A finished run is kept, and so it must be one of those that are to be compared."""
    for choice in bench.choices:
        wanted = bench.configs[choice.number]
        for number in range(1, bench.rounds + 1):
            folder = bench.run_folder(choice, number)
            if not has_finished(folder):
                continue
            found = flatten(read_toml(folder / "config.toml", what="configuration of a run"))
            unlike = sorted(
                key
                for key in wanted.keys() | found.keys()
                if wanted.get(key) != found.get(key) and key not in NO_MATTER
            )
            if unlike:
                key = unlike[0]
                values = f"was {shortened(found.get(key))}, is now {shortened(wanted.get(key))}"
                what = f"a finished run of another configuration: {shortened(key)} {values}"
                raise UserError(Problem("--out", what, str(folder), fix="choose another --out, or remove that folder"))


def run_all(bench: Bench) -> None:
    """All rounds, without what is finished already. Raises Fault where a run fails or a signal ends the bench."""
    total, done, begun = len(bench.choices) * bench.rounds, 0, time.monotonic()
    taken = 0
    for number, order in turns(len(bench.choices), bench.rounds):
        for place in order:
            choice = bench.choices[place]
            folder = bench.run_folder(choice, number)
            done += 1
            said = f"run {done} of {total}: round {number}, {choice.name}"
            if has_finished(folder):
                progress(f"{said}: finished before")
                continue
            seconds = run_one(bench, choice, folder, said)
            taken += 1
            left = (time.monotonic() - begun) / taken * (total - done)
            progress(f"{said}: {show_seconds(seconds)}" + (f", about {show_seconds(left)} left" if left else ""))


def run_one(bench: Bench, choice: Choice, folder: Path, said: str) -> float:
    """One run to its end; its seconds. What an unfinished run left is moved out of the way, not removed."""
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(unused(folder))
    start = time.monotonic()
    code, ended_by = run_launch(bench.argv(choice, folder), bench.environ, log)
    if ended_by is not None:
        name = signal.Signals(ended_by).name
        raise Fault(f"{said}: ended by {name}; the same command goes on from here", 128 + ended_by)
    if code != EXIT_OK or not is_run(folder):
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        todo = "mend what it says and give the same command again: finished runs are kept"
        raise Fault(
            f"{said}: failed with exit code {code}\n\n{tail}\n\nAll it said is in {log}. To do: {todo}",
            code if code > 0 else EXIT_FAULT,
        )
    return time.monotonic() - start


def unused(folder: Path) -> Path:
    numbers = range(1, 1000)
    names = (folder.with_name(f"{folder.name}-unfinished-{number}") for number in numbers)
    return next(path for path in names if not path.exists())


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
