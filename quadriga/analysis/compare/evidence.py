"""Evidence from the traces of runs: where the time went, and which backend carried the bytes.

`analysis.trace` analyses the traces (`quadriga-trace-1`, docs/traces.md). A run whose traces cannot be read has a
reason instead. A backend is credited only if the traces of every repeat show its bytes. The request and the declaration
of a run are not evidence; the collectives in its traces are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from quadriga.analysis.compare.differences import BACKEND_KEY
from quadriga.analysis.compare.runs import Setting, config_table
from quadriga.analysis.compare.statistics import median
from quadriga.errors import UserError
from quadriga.units import format_some

Analysis = dict[str, Any]
Analyse = Callable[[Path], Analysis]

PARTS = ("compute_s", "communication_s", "exposed_communication_s", "memcpy_s", "host_idle_s", "data_wait_s")
EXPOSED = "exposed_communication_s"
TOLERATED_SHARE = 0.01  # share of the bytes that another backend may carry: small reductions
HOST_AXIS = "host"  # groups that serve the host only: their bytes do not belong to training
SYMMETRIC, SYMMETRIC_KERNEL = "nccl-symm", "ncclsymk"
NO_TRACE = "no trace shows who carried the bytes"


@dataclass(frozen=True)
class SettingTraces:
    """The analyses of a setting by number of the repeat, and the reasons for missing ones."""

    analyses: dict[int, Analysis]
    missing: dict[int, str]

    def why_missing(self) -> str:
        """The reasons, each once, with its repeats."""
        reasons: dict[str, list[str]] = {}
        for number, why in self.missing.items():
            reasons.setdefault(why, []).append(str(number))
        return "; ".join(f"repeat {', '.join(numbers)}: {why}" for why, numbers in reasons.items())

    def part_seconds(self, part: str, axis: str | None) -> dict[int, float]:
        """Seconds of a step by number of the repeat, if they are known: of a part, the mean over ranks; of the exposed
        communication on an axis, the sum over its collectives."""
        found = {}
        for number, analysis in self.analyses.items():
            values = [rank["mean"].get(part) for rank in analysis["by_rank"]]
            if axis is not None:
                values = [row["exposed_s_a_step"] for row in analysis["collectives"] if row["axis"] == axis]
            if None not in values and (values or axis is not None):
                found[number] = sum(values) / (len(values) if axis is None else 1)
        return found


def analyse_setting(setting: Setting, analyse: Analyse) -> SettingTraces:
    analyses, missing = {}, {}
    for run in setting.runs:
        try:
            analyses[run.number] = analyse(run.folder)
        except UserError as error:
            missing[run.number] = "; ".join(problem.what for problem in error.problems)
    return SettingTraces(analyses, missing)


def time_by_part(settings: Sequence[Setting], traces: Mapping[str, SettingTraces]) -> list[dict[str, Any]] | None:
    """Seconds of a traced step by part: the mean over ranks, and the median over repeats. Exposed communication is also
    listed by axis. None if a setting has no trace. A part that no trace shows has None for its seconds."""
    if not all(traces[setting.name].analyses for setting in settings):
        return None
    rows: list[dict[str, Any]] = [{"part": part, "axis": None, "by_run": []} for part in PARTS]
    rows += [{"part": exposed_part_name(axis), "axis": axis, "by_run": []} for axis in traced_axes(traces.values())]
    for row, setting in product(rows, settings):
        known = traces[setting.name].part_seconds(row["part"], row["axis"]).values()
        row["by_run"].append({"run": setting.name, "seconds": median([*known]) if known else None})
    return rows


def exposed_part_name(axis: str) -> str:
    return f"exposed_communication_on_{axis}_s"


def traced_axes(traces: Iterable[SettingTraces]) -> list[str]:
    """The axes of all collectives except those between hosts."""
    found = (each["axis"] for one in traces for analysis in one.analyses.values() for each in analysis["collectives"])
    return sorted(set(found) - {HOST_AXIS})


def verify_backend(setting: Setting, traces: SettingTraces) -> dict[str, Any]:
    """Whether the requested backend carried the bytes, with the evidence."""
    requested, declared = requested_backend(setting), _declared_backends(setting)
    sent = _sent_bytes(traces, declared)
    total = sum(sent.amounts.values())
    rows: list[dict[str, Any]] | None = [
        {"axis": axis, "backend": backend, "share_of_bytes": amount / total}
        for (axis, backend), amount in sent.amounts.most_common()
        if total
    ]
    verified = False
    if traces.missing:
        why, rows = f"{NO_TRACE} ({traces.why_missing()})", rows or None
    elif sent.unknown_bytes:
        why = f"the traces do not show the bytes of {format_some(sorted(sent.unknown_bytes))}"
    elif not total:
        why = "the traces show no bytes between ranks"
    else:
        verified, why = _verify(requested, declared, sent)
    why = why if verified else f"not credited: {why}"
    return {"run": setting.name, "asked": requested, "carried": rows, "credited": verified, "why": why}


def requested_backend(setting: Setting) -> str:
    run = setting.runs[0]
    requested = run.config.get(BACKEND_KEY, "none")
    return str(run.environment.get("backend", requested) if requested == "none" else requested)


def _declared_backends(setting: Setting) -> dict[str, str]:
    """The declared backend of each axis; {} if the run declared none."""
    return {axis: str(name) for axis, name in config_table(setting.runs[0].environment, "backends").items()}


@dataclass(frozen=True)
class SentBytes:
    """Bytes of a step by (axis, backend), summed over repeats. `by_name`: bytes known only by the name of a kernel.
    `unknown_bytes`: collectives whose bytes a trace does not show."""

    amounts: Counter[tuple[str, str]]
    by_name: float
    unknown_bytes: set[str]


def _sent_bytes(traces: SettingTraces, declared: Mapping[str, str]) -> SentBytes:
    amounts: Counter[tuple[str, str]] = Counter()
    by_name, unknown_bytes = 0.0, set()
    for analysis in traces.analyses.values():
        for found in analysis["collectives"]:
            amount = found["bytes_a_step"]
            if found["axis"] == HOST_AXIS:
                continue
            if amount is None:
                unknown_bytes.add(f"{found['collective']} ({found['axis']})")
                continue
            amounts[found["axis"], _backend_of(found, declared, analysis)] += amount
            by_name += amount if found["found_by"] == "name" else 0
    return SentBytes(amounts, by_name, unknown_bytes)


def _backend_of(found: Mapping[str, Any], declared: Mapping[str, str], analysis: Analysis) -> str:
    """The backend of a collective. NCCL's kernels for symmetric memory are recognized only by their names."""
    backend = str(found["backend"] or "unknown")
    if backend == "nccl" and declared.get(found["axis"]) == SYMMETRIC:
        kernels = (kernel["name"].lower() for kernel in analysis["kernels"]["top"])
        collective = found["collective"].replace("_", "")
        return SYMMETRIC if any(SYMMETRIC_KERNEL in name and collective in name for name in kernels) else backend
    return backend


def _verify(requested: str, declared: Mapping[str, str], sent: SentBytes) -> tuple[bool, str]:
    total = sum(sent.amounts.values())
    own = sum(amount for (_, backend), amount in sent.amounts.items() if backend == requested)
    elsewhere = declared.get("norms", requested)  # for axes without a declaration, such as reductions over all ranks
    unexpected = {key: sent.amounts[key] for key in sent.amounts if key[1] != declared.get(key[0], elsewhere)}
    if not own or sum(unexpected.values()) > TOLERATED_SHARE * total:
        (axis, backend), _ = max((unexpected or sent.amounts).items(), key=lambda item: item[1])
        share = sum(amount for (_, name), amount in sent.amounts.items() if name == backend) / total
        return False, f"{requested} was asked for, and {backend} carried {_percent(share)} of the bytes ({axis})"
    if sent.by_name > TOLERATED_SHARE * total:
        return False, f"{_percent(sent.by_name / total)} of the bytes are known only by the name of a kernel"
    used = {axis for axis, _ in sent.amounts}
    others = {f"{axis} is on {name}" for axis, name in declared.items() if name != requested and axis in used}
    return True, "; ".join([f"{requested} carried {_percent(own / total)} of the bytes", *sorted(others)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
