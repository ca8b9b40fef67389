"""CCL-Bench's layout of a workload: one flat folder with a card and an uncompressed trace per rank.

CCL-Bench (arXiv:2605.06544) reads neither subfolders nor compressed traces. It reads the first `*.yaml` as the card and
every `*.json` as a trace. This module also reads the values of those traces that a card can be checked against.
"""

from __future__ import annotations

import gzip
import re
import shutil
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.fields import numel
from quadriga.analysis.trace.find import find_traces, rank_in_name
from quadriga.analysis.trace.intervals import Spans, make_spans, window_index
from quadriga.analysis.trace.read import EventTable, read_trace, step_marks
from quadriga.errors import Problem, UserError

RANK_FILE = re.compile(r"(?:rank([0-9]{1,6})_trace|kineto_trace_([0-9]{1,6}))\.json$")
EMBEDDING_LOOKUP = re.compile(r"^aten::embedding$")
CHUNK = 1 << 20


@dataclass(frozen=True)
class RankSummary:
    """Values from the trace of one rank that a card can be checked against.

    `steps`: seconds by number of the profiled step. `tokens`: embedding look-ups in the median step. `table`: elements
    of the embedding. Both are None if the trace shows no look-up: another pipeline stage, a compiled model, no shapes.
    """

    rank: int
    steps: Mapping[int, float]
    tokens: int | None
    table: int | None


def newest_traces(run: Path) -> tuple[int, dict[int, Path]]:
    """The last step of the newest profiler cycle in a run folder, and its traces by rank.

    Raises UserError if there are none.
    """
    found = find_traces(run)
    by_rank = {rank: path for path in found.files if (rank := rank_in_name(path)) is not None}
    if found.iteration is None or len(by_rank) < len(found.files):
        allowed = "profile_trace/iteration_N/rankK_trace.json.gz"
        raise UserError(Problem("RUN", "its traces are not in the layout of a run", str(run), allowed=allowed))
    return found.iteration, by_rank


def unpack_traces(traces: Mapping[int, Path], folder: Path) -> list[Path]:
    """Write each trace uncompressed as `rank<k>_trace.json` into a folder. Returns the paths in the order of ranks.

    Raises UserError if a trace cannot be decompressed.
    """
    targets = []
    for rank, source in sorted(traces.items()):
        targets.append(folder / f"rank{rank}_trace.json")
        opener = gzip.open if source.suffix.lower() == ".gz" else open
        try:
            with opener(source, "rb") as packed, targets[-1].open("wb") as plain:
                shutil.copyfileobj(packed, plain, CHUNK)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(Problem(str(source), f"the trace cannot be decompressed: {error}")) from None
    return targets


def rank_files(folder: Path) -> dict[int, Path]:
    """The traces that CCL-Bench finds in a folder, by rank."""
    paths = sorted(folder.glob("*.json"))
    return {int(match[1] or match[2]): path for path in paths if (match := RANK_FILE.fullmatch(path.name))}


def read_rank_summary(rank: int, path: Path) -> RankSummary:
    """Steps and embedding look-ups of one trace. Raises UserError if the file is not a trace."""
    trace = read_trace(path, rank)
    ops = trace.ops
    marks = {step.number: step for step in step_marks(ops, trace.names)}
    steps = {number: marks[number].seconds for number in sorted(marks)}
    in_time = sorted(marks.values(), key=lambda step: (step.start, step.end))
    windows = make_spans([step.start for step in in_time], [step.end for step in in_time])
    tokens, table = _looked_up(ops, np.flatnonzero(trace.is_named(ops, EMBEDDING_LOOKUP)), windows)
    return RankSummary(rank, steps, tokens, table)


def average_step_time(traces: Sequence[RankSummary]) -> float | None:
    """CCL-Bench's `avg_step_time` in seconds: the mean over ranks of the mean step. With more than two steps, the first
    and the last do not count. None if no trace has steps."""
    means = [statistics.mean(kept) for trace in traces if (kept := without_ends(list(trace.steps.values())))]
    return statistics.mean(means) if means else None


def without_ends(steps: list[Any]) -> list[Any]:
    """The steps of a rank that `avg_step_time` counts. `steps`: in order."""
    return steps[1:-1] if len(steps) > 2 else steps


def _looked_up(ops: EventTable, lookups: NDArray[np.intp], windows: Spans) -> tuple[int | None, int | None]:
    """Tokens looked up in the median step, and elements of the table. Nested look-ups count once.

    `windows`: the steps, in the order of time.
    """
    tokens = [0] * len(windows)
    order = lookups[np.lexsort((-ops.end[lookups], ops.start[lookups]))]
    table, end = None, -1.0
    for at, place in zip(order.tolist(), window_index(ops.start[order], windows).tolist(), strict=True):
        dims = ops.args[at].get("Input Dims") or []
        if ops.start[at] < end or len(dims) < 2 or not isinstance(dims[0], list) or len(dims[0]) != 2:
            continue
        end = float(ops.end[at])
        table = max(table or 0, numel(dims[0]))
        if place >= 0:
            tokens[place] += numel(dims[1])
    seen = statistics.median_low(tokens) if tokens else 0
    return (seen, table) if seen else (None, table)
