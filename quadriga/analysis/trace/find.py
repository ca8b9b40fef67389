"""Finds the set of traces in a folder: one file per rank, of the same steps.

RUN/profile_trace/iteration_N/rankK_trace.json.gz     Quadriga
profiling/traces/iteration_N/rankK_trace.json(.gz)    torchtitan
kineto_trace_K.json, *.pt.trace.json                  others, also flat
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import Problem, UserError
from quadriga.reading import file_kind
from quadriga.units import format_some

NAME = re.compile(r"trace.*\.json(\.gz)?$|\.trace\.json(\.gz)?$|^rank[-_]?\d+.*\.json(\.gz)?$", re.IGNORECASE)
RANK = re.compile(r"rank[-_]?([0-9]{1,6})(?![0-9])|trace[-_]([0-9]{1,6})\.", re.IGNORECASE)
ITERATION = re.compile(r"^(?:iteration|step)[-_]?([0-9]{1,15})$")
ESTIMATE = "estimate.json"


@dataclass(frozen=True)
class TraceSet:
    """`files`: in path order. `iteration`: number in the name of their folder, or None. `others`: further iterations.
    `run`: the run folder that contains them, if it has an estimate."""

    folder: Path
    files: tuple[Path, ...]
    iteration: int | None
    others: tuple[int, ...]
    run: Path | None


def find_traces(place: Path, iteration: int | None = None) -> TraceSet:
    """The traces in a folder, or one file. Of several iterations, the newest or the requested one.

    Raises UserError if there are no traces, or not of that iteration, or if several folders qualify.
    """
    if place.is_file():
        return TraceSet(place.parent, (place,), _iteration(place.parent), (), None)
    if not place.is_dir():
        there = os.stat(place, follow_symlinks=place.exists()).st_mode if os.path.lexists(place) else 0
        what = f"this is {file_kind(there)}, not a file or folder" if there else "there is no such file or folder"
        raise UserError(Problem("TRACES", what, str(place)))
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(place.rglob("*.json*")):
        if NAME.search(path.name) and not path.name.startswith(".") and not path.is_dir():
            by_folder[_set_folder(path)].append(path)
    if not by_folder:
        what = "there is no trace of torch.profiler"
        fix = "train with --profiling.enable_profiling, or name the folder of the traces"
        allowed = "rankK_trace.json(.gz), kineto_trace_K.json or *.pt.trace.json, in any subfolder"
        raise UserError(Problem("TRACES", what, str(place), allowed=allowed, fix=fix))
    numbers = {folder: _iteration(folder) for folder in by_folder}
    chosen = _choose(place, numbers, iteration)
    others = sorted({each for each in numbers.values() if each not in (None, numbers[chosen])})
    return TraceSet(place, tuple(by_folder[chosen]), numbers[chosen], tuple(others), run_folder(chosen))


def rank_in_name(path: Path) -> int | None:
    """The rank in the name of a file or of its folder; None if there is none."""
    matches = map(RANK.search, (path.name, path.parent.name))
    return next((int(match[1] or match[2]) for match in matches if match), None)


def _set_folder(path: Path) -> Path:
    """The folder of a set: for one folder per rank, the folder above."""
    return path.parent.parent if re.match(r"rank[-_]?\d+$", path.parent.name) else path.parent


def _iteration(folder: Path) -> int | None:
    matches = (ITERATION.match(part) for part in reversed(folder.parts))
    return next((int(match[1]) for match in matches if match), None)


def _choose(place: Path, numbers: dict[Path, int | None], iteration: int | None) -> Path:
    there = sorted(number for number in numbers.values() if number is not None)
    wanted = max(there, default=None) if iteration is None else iteration
    fitting = [folder for folder, number in numbers.items() if number == wanted]
    if not fitting:
        what = "there are no traces of this iteration"
        raise UserError(Problem("--step", what, str(iteration), allowed=format_some([*map(str, there)]) or "none"))
    if len(fitting) > 1:
        what = "several folders hold traces, and their names do not decide"
        names = format_some([str(folder.relative_to(place)) for folder in fitting])
        raise UserError(Problem("TRACES", what, str(place), allowed=names, fix="name one of them"))
    return fitting[0]


def run_folder(folder: Path) -> Path | None:
    """The run folder of the traces in `folder`: the first of it and the three above with an estimate; None: none."""
    return next((each for each in (folder, *folder.parents[:3]) if (each / ESTIMATE).exists()), None)
