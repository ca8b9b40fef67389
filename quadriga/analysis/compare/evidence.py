"""What the traces of the runs say: where the time went, and which backend carried the bytes.

The traces are read by `analysis.trace`, whose answer (`quadriga-trace-1`, docs/traces.md) is taken as it is; a run
whose traces cannot be read has a reason in its place. A backend is credited only if in every repeat the trace shows
its bytes: what a run asked for or declared is a wish, what its collectives went through is evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quadriga.analysis.compare.differences import BACKEND
from quadriga.analysis.compare.runs import Setting, table
from quadriga.analysis.compare.statistics import median
from quadriga.errors import UserError
from quadriga.units import show_some

Analysis = dict[str, Any]
Analyse = Callable[[Path], Analysis]

PARTS = ("compute_s", "communication_s", "exposed_communication_s", "memcpy_s", "host_idle_s", "data_wait_s")
EXPOSED = "exposed_communication_s"
STRAY = 0.01  # the share of bytes that another backend may carry: small sums
HOST = "host"  # the axis of agreements between the ranks' hosts, which are no part of the training's bytes
SYMMETRIC, SYMMETRIC_KERNEL = "nccl-symm", "ncclsymk"
NO_TRACE = "no trace shows who carried the bytes"


@dataclass(frozen=True)
class Traced:
    """The analyses of a setting by number of the repeat, and why others have none."""

    analyses: dict[int, Analysis]
    missing: dict[int, str]

    def why_missing(self) -> str:
        """The reasons, each once, with the repeats that it holds for."""
        reasons: dict[str, list[str]] = {}
        for number, why in self.missing.items():
            reasons.setdefault(why, []).append(str(number))
        return "; ".join(f"repeat {', '.join(numbers)}: {why}" for why, numbers in reasons.items())


def read_traces(setting: Setting, analyse: Analyse) -> Traced:
    analyses, missing = {}, {}
    for run in setting.runs:
        try:
            analyses[run.number] = analyse(run.folder)
        except UserError as error:
            missing[run.number] = "; ".join(problem.what for problem in error.problems)
    return Traced(analyses, missing)


def where(settings: Sequence[Setting], traced: Mapping[str, Traced]) -> list[dict[str, Any]] | None:
    """Seconds of a traced step by part, the mean of the ranks and the median of the repeats; exposed communication once
    more by axis. None where a setting has no trace. A part that no trace tells has None for its seconds."""
    if not all(traced[setting.name].analyses for setting in settings):
        return None
    parts = [_row(part, None, settings, partial(part_of, part), traced) for part in PARTS]
    axes = axes_of(traced.values())
    return [*parts, *(_row(exposed_on(axis), axis, settings, partial(exposed_of, axis), traced) for axis in axes)]


def _row(
    part: str,
    axis: str | None,
    settings: Sequence[Setting],
    read: Callable[[Analysis], float | None],
    traced: Mapping[str, Traced],
) -> dict[str, Any]:
    """`axis`: for a row that is a part of another one."""
    by_run = []
    for setting in settings:
        values = [read(each) for each in traced[setting.name].analyses.values()]
        known = [value for value in values if value is not None]
        by_run.append({"run": setting.name, "seconds": median(known) if known else None})
    return {"part": part, "axis": axis, "by_run": by_run}


def part_of(part: str, analysis: Analysis) -> float | None:
    """Seconds of a step, the mean over ranks; None where a rank cannot tell."""
    values = [rank["mean"].get(part) for rank in analysis["by_rank"]]
    return sum(values) / len(values) if values and None not in values else None


def exposed_of(axis: str, analysis: Analysis) -> float | None:
    """Exposed seconds of a step in the collectives of one axis; None where one of them cannot tell."""
    values = [found["exposed_s_a_step"] for found in analysis["collectives"] if found["axis"] == axis]
    return sum(values) if None not in values else None


def exposed_on(axis: str) -> str:
    return f"exposed_communication_on_{axis}_s"


def axes_of(traced: Iterable[Traced]) -> list[str]:
    """Of all collectives, but for what passes between hosts beside the training."""
    found = (each["axis"] for one in traced for analysis in one.analyses.values() for each in analysis["collectives"])
    return sorted(set(found) - {HOST})


def credit(setting: Setting, traced: Traced) -> dict[str, Any]:
    """Whether the backend that was asked for carried the bytes, and on what evidence."""
    asked, declared = asked_of(setting), _declared(setting)
    sent = _sent(traced, declared)
    total = sum(sent.amounts.values())
    rows: list[dict[str, Any]] | None = [
        {"axis": axis, "backend": backend, "share_of_bytes": amount / total}
        for (axis, backend), amount in sorted(sent.amounts.items(), key=lambda item: -item[1])
        if total
    ]
    if traced.missing:
        credited, why = False, f"{NO_TRACE} ({traced.why_missing()})"
        rows = rows or None
    elif sent.untold:
        credited, why = False, f"the traces do not tell the bytes of {show_some(sorted(sent.untold))}"
    elif not total:
        credited, why = False, "the traces show no bytes between ranks"
    else:
        credited, why = _judge(asked, declared, sent)
    why = why if credited else f"not credited: {why}"
    return {"run": setting.name, "asked": asked, "carried": rows, "credited": credited, "why": why}


def asked_of(setting: Setting) -> str:
    run = setting.runs[0]
    asked = run.config.get(BACKEND, "none")
    return str(run.environment.get("backend", asked) if asked == "none" else asked)


def _declared(setting: Setting) -> dict[str, str]:
    """By axis, which backend the run said would serve it; {} where it said nothing."""
    return {axis: str(name) for axis, name in table(setting.runs[0].environment, "backends").items()}


@dataclass(frozen=True)
class Sent:
    """Bytes of a step by axis and backend, summed over repeats. `by_name`: those that are known by a kernel's name
    alone; `untold`: collectives whose bytes no trace tells."""

    amounts: Counter[tuple[str, str]]
    by_name: float
    untold: set[str]


def _sent(traced: Traced, declared: Mapping[str, str]) -> Sent:
    amounts: Counter[tuple[str, str]] = Counter()
    by_name, untold = 0.0, set()
    for analysis in traced.analyses.values():
        for found in analysis["collectives"]:
            amount = found["bytes_a_step"]
            if found["axis"] == HOST:
                continue
            if amount is None:
                untold.add(f"{found['collective']} ({found['axis']})")
                continue
            amounts[found["axis"], _carrier(found, declared, analysis)] += amount
            by_name += amount if found["found_by"] == "name" else 0
    return Sent(amounts, by_name, untold)


def _carrier(found: Mapping[str, Any], declared: Mapping[str, str], analysis: Analysis) -> str:
    """The backend of a collective. NCCL's kernels for symmetric memory are known by their names alone."""
    backend = str(found["backend"] or "unknown")
    if backend == "nccl" and declared.get(found["axis"]) == SYMMETRIC:
        kernels = (kernel["name"].lower() for kernel in analysis["kernels"]["top"])
        word = found["collective"].replace("_", "")
        return SYMMETRIC if any(SYMMETRIC_KERNEL in name and word in name for name in kernels) else backend
    return backend


def _judge(asked: str, declared: Mapping[str, str], sent: Sent) -> tuple[bool, str]:
    total = sum(sent.amounts.values())
    own = sum(amount for (_, backend), amount in sent.amounts.items() if backend == asked)
    elsewhere = declared.get("norms", asked)  # of an axis that the run declared nothing of: the sums over all ranks
    strays = {
        (axis, backend): amount
        for (axis, backend), amount in sent.amounts.items()
        if backend != declared.get(axis, elsewhere)
    }
    if not own or sum(strays.values()) > STRAY * total:
        (axis, backend), _ = max((strays or sent.amounts).items(), key=lambda item: item[1])
        share = sum(amount for (_, name), amount in sent.amounts.items() if name == backend) / total
        return False, f"{asked} was asked for, and {backend} carried {_percent(share)} of the bytes ({axis})"
    if sent.by_name > STRAY * total:
        return False, f"{_percent(sent.by_name / total)} of the bytes are known by a kernel's name alone"
    others = {f"{axis} is on {name}" for axis, name in declared.items() if name != asked and axis in axes_sent(sent)}
    return True, "; ".join([f"{asked} carried {_percent(own / total)} of the bytes", *sorted(others)])


def axes_sent(sent: Sent) -> set[str]:
    return {axis for axis, _ in sent.amounts}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
