"""Reads run folders for a comparison: a run, and a setting, which is one run or a folder of its repeats.

RUN/config.toml, environment.json, metrics.jsonl, events.jsonl     one run, as quadriga/train writes it
SETTING/repeat-1/, repeat-2/, ...                                  repeats of one setting, one run folder each
BENCH/bench.json, setting-1/, setting-2/, ...                      as `quadriga bench` writes it

The windows of steps of a run: a window is the steps between two records of `metrics.jsonl`. It counts if none of its
steps is excluded. Excluded are

- the first `warmup` steps of each start of the run (compilation, caches, growth of the allocator);
- steps in which the profiler warms up or records, and the step after them, in which the trace is written. If fewer than
  FEWEST_WINDOWS windows would remain, these steps count too, with a warning.

Saves and validations are in no window (see quadriga/metrics/meter.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from quadriga import limits
from quadriga.errors import Problem, UserError, shortened
from quadriga.metrics.cycles import Cycle
from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics
from quadriga.reading import read_json_object, read_toml

# --- windows of steps ------------------------------------------------------------------------------------------------

Record = dict[str, Any]

WARMUP_STEPS = 5
FEWEST_WINDOWS = 3


@dataclass(frozen=True)
class StepWindow:
    """The steps `first` to `last`, and the record of them."""

    first: int
    last: int
    record: Record


def cycle_of(profiling: Mapping[str, Any], steps: int) -> Cycle | None:
    """The profiler's cycle of a table `[profiling]`, for a start of `steps` steps; None without the profiler."""
    if profiling.get("enable_profiling") is not True:
        return None
    return Cycle.of_run(profiling["profile_freq"], profiling["profiler_warmup"], profiling["profiler_active"], steps)


def windows_of(records: Sequence[Record]) -> dict[int, list[StepWindow]]:
    """By attempt, all windows except the first, whose first step is unknown."""
    groups = groupby(records, key=lambda record: int(record["attempt"]))
    return {
        attempt: [StepWindow(before["step"] + 1, after["step"], after) for before, after in pairwise(own)]
        for attempt, own in groups
    }


def counted_windows(
    records: Sequence[Record], profiling: Mapping[str, Any], steps: int, warmup: int
) -> tuple[list[StepWindow], str | None]:
    """The windows that count, and a warning if they include steps with the profiler, else None.

    `records`: of training, by step; `profiling`: the table of the configuration; `steps`: the last step of the run.
    """
    undisturbed: list[StepWindow] = []
    after_warmup: list[StepWindow] = []
    for windows in windows_of(records).values():
        if not windows:
            continue
        # The first record of the first attempt is of step 1. That of a later attempt may be some steps after its start.
        first_step = windows[0].first - 1
        cycle = cycle_of(profiling, max(steps - first_step + 1, 1))
        for window in windows:
            if window.first < first_step + warmup:
                continue
            after_warmup.append(window)
            # Cycles repeat, so the first cycle's length of steps of a window is enough to check.
            most = window.first + (cycle.length if cycle else 0)
            inside = range(window.first, min(window.last, most) + 1)
            if cycle is None or not any(cycle.disturbs(step, first_step) for step in inside):
                undisturbed.append(window)
    if len(undisturbed) >= FEWEST_WINDOWS or len(undisturbed) == len(after_warmup):
        return undisturbed, None
    return after_warmup, "steps that the profiler slowed are counted, because too few others are left"


def predicted_records(steps: int, log_freq: int) -> list[Record]:
    """The records that a future run will write, without figures."""
    logged = [step for step in range(1, steps + 1) if step == 1 or step % log_freq == 0 or step == steps]
    return [{"step": step, "attempt": 1} for step in logged]


# --- run folders -----------------------------------------------------------------------------------------------------


METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.toml"
ENVIRONMENT_FILE, BENCH_FILE = "environment.json", "bench.json"
REPEAT = re.compile(r"repeat-([0-9]{1,9})")
REQUIRED = ("time", "loss", "step_seconds", "tokens_seen")  # fields of each record that a comparison reads
MAX_SETTINGS = 1000  # of one bench
# Keys of `config.toml` that are used in arithmetic, with their least values.
MINIMUM_VALUES = {"training.steps": 1, "profiling.profile_freq": 1}
MINIMUM_VALUES |= {"profiling.profiler_warmup": 0, "profiling.profiler_active": 1}
LARGEST_FIGURE = 1e150  # larger ones count as infinite
Flat = dict[str, Any]  # `section.key` -> value


def is_comparable(value: float) -> bool:
    """Whether sums and squares of such values are in float64 too."""
    return abs(value) <= LARGEST_FIGURE  # False for NaN


@dataclass(frozen=True)
class RunFolder:
    """One run. `number`: of the repeat, and so of the round, from 1."""

    folder: Path
    number: int
    config: Flat
    environment: Flat
    records: list[Record]
    windows: list[StepWindow]
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def span(self) -> tuple[float, float]:
        """Times of the first and the last record, in seconds since the epoch."""
        return self.records[0]["time"], self.records[-1]["time"]

    @property
    def losses(self) -> dict[int, float]:
        return {record["step"]: float(record["loss"]) for record in self.records}

    def window_values(self, name: str) -> list[float]:
        """The finite values of a figure in all windows."""
        values = (window.record.get(name) for window in self.windows)
        return [float(value) for value in values if value is not None and is_comparable(value)]


@dataclass(frozen=True)
class Setting:
    """The repeats of one setting, by number. `name`: in the report. `unfinished`: folders of repeats that have not
    finished, which are excluded."""

    name: str
    folder: Path
    runs: list[RunFolder]
    unfinished: list[str] = field(default_factory=list)


def read_setting(name: str, folder: Path, warmup: int) -> Setting:
    """Read a run folder or a folder of repeats as the setting `name`.

    Raises:
        UserError: it is neither, or a file cannot be read.
    """
    if is_run(folder):
        return Setting(name, folder, [read_run_folder(folder, 1, warmup)])
    found = repeats_of(folder)
    repeats = {number: path for number, path in found.items() if has_finished(path)} or found
    if not repeats:
        what = "the folder has no run" if os.path.isdir(folder) else "there is no such folder"
        allowed = f"a run folder (with {METRICS_FILE}), a folder of runs repeat-1, repeat-2, ..., or that of a bench"
        raise UserError(Problem("RUN", what, str(folder), allowed=allowed))
    runs = [read_run_folder(path, number, warmup) for number, path in repeats.items()]
    return Setting(name, folder, runs, [path.name for number, path in found.items() if number not in repeats])


def is_run(folder: Path) -> bool:
    return os.path.isfile(folder / METRICS_FILE)  # unlike Path.is_file, it does not raise for an invalid path


def repeats_of(folder: Path) -> dict[int, Path]:
    """The runs in a folder of repeats, by number."""
    found = {int(match[1]): path for path in folder.glob("repeat-*") if (match := REPEAT.fullmatch(path.name))}
    return {number: found[number] for number in sorted(found) if is_run(found[number])}


def folders_of(named: Sequence[Path]) -> list[Path]:
    """The folders of the settings. The folder of a bench is replaced by the folders of its settings."""
    return [setting for folder in named for setting in (_settings_of_bench(folder) or [folder])]


def _settings_of_bench(folder: Path) -> list[Path]:
    found = read_bench(folder / BENCH_FILE)
    return [folder / setting["folder"] for setting in found["settings"]] if found else []


def find_bench(settings: Sequence[Path]) -> dict[str, Any] | None:
    """The record (`bench.json`) of the bench to which all these folders belong; None if there is none."""
    parents = {_real(folder).parent for folder in settings}
    found = read_bench(parents.pop() / BENCH_FILE) if len(parents) == 1 else None
    known = {setting["folder"] for setting in found["settings"]} if found else set()
    return found if {_real(folder).name for folder in settings} <= known else None


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))  # unlike Path.resolve, it does not raise for a loop of links


def read_bench(path: Path) -> dict[str, Any] | None:
    """The validated record of a bench (see `analysis.compare.plan`); None if there is no file.

    Raises:
        UserError: `quadriga bench` does not write such a record.
    """
    found = read_optional_json(path)
    if found is None:
        return None
    settings, varied = found.get("settings"), found.get("varied")
    known = isinstance(settings, list) and 0 < len(settings) <= MAX_SETTINGS and all(map(_is_setting, settings))
    if not isinstance(settings, list) or not known or not isinstance(varied, dict):
        allowed = '{"varied": {KEY: [VALUE, ...]}, "settings": [{"folder": "setting-1", "name": TEXT}, ...]}'
        raise UserError(Problem(str(path), "not the record of a bench", allowed=allowed, fix="bench again, elsewhere"))
    for key in ("folder", "name"):
        if len({setting[key] for setting in settings}) < len(settings):
            raise UserError(Problem(str(path), f"two settings of the bench have the same {key}"))
    return found


def _is_setting(setting: Any) -> bool:
    if not isinstance(setting, dict) or not isinstance(setting.get("name"), str):
        return False
    folder = setting.get("folder")  # a name in the bench's folder, not a path
    return isinstance(folder, str) and folder == os.path.basename(folder) != "" and _is_file_name(folder)


def _is_file_name(text: str) -> bool:
    """Whether the text is a valid file name. `.` and `..` are not."""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return size <= limits.PATH_PART and "\0" not in text and text.strip(".") != ""


def names_of(settings: Sequence[Path], bench: Mapping[str, Any] | None) -> list[str]:
    """A name for each folder: that of the bench, else the last parts of its path that make the names different."""
    if bench is not None:
        by_folder = {setting["folder"]: str(setting["name"]) for setting in bench["settings"]}
        return [by_folder[_real(folder).name] for folder in settings]
    parts = [_real(folder).parts for folder in settings]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(Problem("RUN", "the same folder is named twice", str(settings[0])))


def read_run_folder(folder: Path, number: int, warmup: int) -> RunFolder:
    """Read one run folder. Invalid lines of its metrics are ignored, with a warning.

    Raises:
        UserError: a file cannot be read, or too few steps were logged.
    """
    warnings: list[str] = []
    records = read_metrics(folder / METRICS_FILE, required=REQUIRED, notices=warnings)
    config = flatten_tables(read_toml(folder / CONFIG_FILE, what="configuration of a run"))
    check_whole_numbers(folder / CONFIG_FILE, config)
    steps = config["training.steps"]
    windows, slowed = counted_windows(records, config_table(config, "profiling"), steps, warmup)
    if not windows:
        what = f"no window of steps is left after the warm-up of {warmup} steps ({len(records)} records)"
        fix = "train longer, log more often (metrics.log_freq), or lower --warmup"
        raise UserError(Problem("RUN", "; ".join([what, *warnings]), str(folder), fix=fix))
    environment = read_optional_json(folder / ENVIRONMENT_FILE)
    warnings += [slowed] if slowed else []
    if environment is None:
        warnings.append(f"no {ENVIRONMENT_FILE}: machine and versions of the run are not known")
    if records[-1]["step"] < steps:
        warnings.append(f"ended after step {records[-1]['step']} of {steps}")
    if (attempts := records[-1]["attempt"]) > 1:
        warnings.append(f"was started {attempts} times")
    if skipped := records[-1].get("skipped_steps", 0):
        warnings.append(f"{skipped} of its steps were bad and skipped")
    return RunFolder(folder, number, config, flatten_tables(environment or {}), records, windows, warnings)


def check_whole_numbers(path: Path, config: Flat) -> None:
    """Raise UserError if a key of `MINIMUM_VALUES` is not an integer in its range."""
    profiled = config.get("profiling.enable_profiling") is True
    for key, least in MINIMUM_VALUES.items():
        value = config.get(key)
        is_used = profiled or not key.startswith("profiling.")
        if is_used and (type(value) is not int or not least <= value < 2**63):
            fix = "name the folder of a finished run (job.dump_folder)"
            what, shown = ("is missing", None) if value is None else ("is not a valid integer", shortened(repr(value)))
            raise UserError(Problem(key, what, shown, source=str(path), allowed=f"{least} or more", fix=fix))


def has_finished(folder: Path) -> bool:
    """Whether the newest start of a run ended with exit code 0."""
    events = read_events(folder)
    newest = max((event["attempt"] for event in events), default=0)
    return any(e["event"] == "end" and e["attempt"] == newest and e.get("code") == 0 for e in events)


def flatten_tables(tables: Mapping[str, Any], prefix: str = "") -> Flat:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: Flat = {}
    for name, value in tables.items():
        is_table = isinstance(value, dict)
        flat |= flatten_tables(value, f"{prefix}{name}.") if is_table else {prefix + name: value}
    return flat


def config_table(flat: Flat, name: str) -> dict[str, Any]:
    """One table of a flattened configuration."""
    return {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. Raises UserError if it is damaged."""
    return read_json_object(path, what="record") if os.path.exists(path) else None
