"""Analyses the traces of a run into one dict for JSON (format `quadriga-trace-1`, see docs/traces.md)."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from quadriga.analysis.trace import collectives
from quadriga.analysis.trace.calls import NAME
from quadriga.analysis.trace.find import TraceSet, find_traces, rank_in_name
from quadriga.analysis.trace.rank import RankResult, analyse_rank, mean_breakdown
from quadriga.errors import Fault, Problem, UserError
from quadriga.units import MIB, format_some

FORMAT = "quadriga-trace-1"
PARALLEL_READ_BYTES = 8 * MIB  # size of files: smaller sets are read faster than a process starts
TOP_KERNELS = 20
FEW_STEPS = 5


def analyse(place: Path, iteration: int | None = None, processes: int | None = None) -> dict[str, Any]:
    """Analyse the traces of a run folder, a folder of traces, or one file.

    Args:
        iteration: N of `iteration_N`; None: the newest.
        processes: number of files that are read in parallel; None: the number of cores.

    Raises:
        UserError: there is no trace, a file is not a complete trace, or two files are of one rank.
        Fault: a process that reads traces was killed.
    """
    chosen = find_traces(place, iteration)
    found = _read_all(chosen.files, processes)
    _refuse_duplicate_ranks([rank.rank for rank in found], chosen)
    ranks = sorted(found, key=lambda rank: rank.rank)
    why_not_comparable = collectives.why_not_comparable(ranks)
    matched, contradictions = collectives.match_transfers(ranks) if why_not_comparable is None else (None, 0)
    measured = _step_times(ranks)
    estimate, why_none = _estimate(ranks, chosen)
    result = {
        "format": FORMAT,
        "source": str(place),
        "iteration": chosen.iteration,
        "device_type": "cuda" if any(rank.on_device for rank in ranks) else "cpu",
        "ranks": [rank.rank for rank in ranks],
        "world_size": _world_size(ranks),
        "steps": [step.number for step in ranks[0].steps],
        **measured,
        "collectives": collectives.collective_rows(ranks, matched),
        "kernels": _kernels(ranks),
        "estimate": estimate,
        "timeline": _timeline(ranks, why_not_comparable is None),
    }
    result["not_measurable"] = _not_measurable(ranks, result, why_not_comparable)
    if estimate is None:
        result["not_measurable"]["estimate"] = why_none
    result["warnings"] = _warnings(ranks, chosen, contradictions, len(matched or ()))
    return result


def _read_all(files: tuple[Path, ...], processes: int | None) -> list[RankResult]:
    lone = 0 if len(files) == 1 else None
    jobs = [(path, lone if rank_in_name(path) is None else None, len(files)) for path in files]
    workers = min(processes or _cores(), len(files))
    if workers == 1 or sum(path.stat().st_size for path in files) < PARALLEL_READ_BYTES:
        return [analyse_rank(*job) for job in jobs]
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(analyse_rank, *zip(*jobs, strict=True)))
    except BrokenProcessPool:
        todo = "no file was changed; provide more memory, or analyse one file at a time"
        raise Fault(f"a process that read traces was killed, most likely because memory ran out: {todo}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_duplicate_ranks(numbers: list[int], chosen: TraceSet) -> None:
    """`numbers`: the ranks of the files, in their order."""
    duplicates = {number for number in numbers if numbers.count(number) > 1}
    if duplicates:
        files = [str(path) for number, path in zip(numbers, chosen.files, strict=True) if number in duplicates]
        what = f"several files are of rank {format_some([*map(str, sorted(duplicates))])}: {format_some(files)}"
        raise UserError(Problem("TRACES", what, str(chosen.folder), fix="keep one file per rank in the folder"))


def _world_size(ranks: list[RankResult]) -> int:
    return max([rank.metadata.world_size or 0 for rank in ranks] + [len(ranks)])


def _step_times(ranks: list[RankResult]) -> dict[str, Any]:
    """Step times, by rank too, and the slowest rank."""
    taken, by_rank = [step.seconds for rank in ranks for step in rank.steps], []
    for rank in ranks:
        numbered = zip(rank.steps, rank.step_breakdowns, strict=True)
        steps = [{"step": step.number, **figures} for step, figures in numbered]
        by_rank.append({"rank": rank.rank, "mean": mean_breakdown(rank.step_breakdowns), "steps": steps})
    middle = statistics.median(taken)
    return {
        "step_time_s": {"mean": statistics.fmean(taken), "median": middle, "min": min(taken), "max": max(taken)},
        "by_rank": by_rank,
        "slowest": _slowest(by_rank, middle),
    }


def _slowest(by_rank: list[dict[str, Any]], step: float) -> dict[str, Any] | None:
    """The rank with the longest time outside of exposed communication, and the difference to the median of all ranks.
    None for one rank, or if communication is not known."""
    means = {entry["rank"]: entry["mean"] for entry in by_rank}
    if len(means) < 2 or any(mean["exposed_communication_s"] is None for mean in means.values()):
        return None
    own = {rank: mean["seconds"] - mean["exposed_communication_s"] for rank, mean in means.items()}
    rank = max(own, key=lambda rank: own[rank])
    by = own[rank] - statistics.median(own.values())
    return {"rank": rank, "by_s": by, "by_share": by / step}


def _kernels(ranks: list[RankResult]) -> dict[str, Any]:
    """Seconds per step, means over ranks. Shares are of the sum of all families."""
    families, blocks, names, numbers = (defaultdict[str, float](float) for _ in range(4))
    for rank in ranks:
        scale = 1 / len(rank.steps) / len(ranks)
        for found, own in ((families, rank.totals.families), (blocks, rank.totals.blocks or {})):
            for name, seconds in own.items():
                found[name] += seconds * scale
        for name, (seconds, number) in rank.totals.names.items():
            names[name] += seconds * scale
            numbers[name] += number * scale
    whole = sum(families.values())
    top = _time_rows(names, whole)[:TOP_KERNELS]
    return {
        "families": _time_rows(families, whole),
        "blocks": _time_rows(blocks, sum(blocks.values())),
        "top": [{**entry, "calls_a_step": numbers[entry["name"]]} for entry in top],
    }


def _time_rows(seconds: dict[str, float], whole: float) -> list[dict[str, Any]]:
    order = sorted(seconds.items(), key=lambda item: -item[1])
    return [{"name": name, "seconds_a_step": each, "share": each / whole if whole else 0.0} for name, each in order]


def _estimate(ranks: list[RankResult], chosen: TraceSet) -> tuple[dict[str, Any] | None, str]:
    """Measured and estimated calls and bytes, for the start of the run that made the traces; or None and the reason."""
    if chosen.run is None:
        return None, "the run folder has no estimate.json"
    predicted, why = collectives.read_prediction(chosen.run, ranks[0].metadata.notes.attempt)
    return None if predicted is None else {"rows": collectives.compare_with_estimate(ranks, predicted)}, why


def _timeline(ranks: list[RankResult], aligned: bool) -> dict[str, Any]:
    """The spans of the middle step. If clocks are comparable, ranks share one origin; else each starts at 0."""
    first_origin_ns = min((rank.origin_ns or 0 for rank in ranks), default=0)
    shown = [rank.steps[len(rank.steps) // 2] for rank in ranks]
    shifts = [((rank.origin_ns or 0) - first_origin_ns) * 1e-9 if aligned else 0.0 for rank in ranks]
    starts = [step.start + shift for step, shift in zip(shown, shifts, strict=True)]
    zeros = [min(starts) - shift if aligned else start for start, shift in zip(starts, shifts, strict=True)]
    strips = [
        {"rank": rank.rank, "lane": stream, "spans": [[start - zero, end - zero, name] for start, end, name in spans]}
        for rank, zero in zip(ranks, zeros, strict=True)
        for stream, spans in rank.strips.items()
    ]
    return {"step": shown[0].number, "start_s": 0.0, "strips": strips}


def _not_measurable(ranks: list[RankResult], result: dict[str, Any], why_not_comparable: str | None) -> dict[str, str]:
    """The reason for each None, by figure or group of figures."""
    found: dict[str, str] = {}
    if any(entry["mean"]["communication_s"] is None for entry in result["by_rank"]):
        what = "no operation, annotation or kernel of the trace was identified as a collective"
        found["communication_s"] = f"{what}; if there was one, it is part of the computing or the idle time"
        found["exposed_communication_s"] = "communication was not identified"
    if result["device_type"] == "cpu":
        found["memcpy_s"] = "a CPU has no copies between host and device"
        found["host_idle_s"] = "the host is the device: time without work or waiting is `rest_s`"
    if not all(rank.has_data_marks for rank in ranks):
        found["data_wait_s"] = "the trace has no mark of it (`quadriga:data_wait`, or the mark of torch's DataLoader)"
    if not result["kernels"]["blocks"]:
        found["blocks"] = "the trace has no marks of the model's blocks (FSDP writes them)"
    if result["slowest"] is None:
        found["slowest"] = "it needs the traces of several ranks, and their exposed communication"
    if result["collectives"]:
        found |= _unmeasured_collectives(result["collectives"], why_not_comparable)
    return found


def _unmeasured_collectives(rows: list[dict[str, Any]], why_not_comparable: str | None) -> dict[str, str]:
    found = {}
    if why_not_comparable is not None:
        found["transfer_s"] = found["start_skew_s"] = found["bus_gb_s"] = why_not_comparable
    for row in rows:
        name = f"{row['axis']} {row['collective']}"
        if row["axis"] == "?":
            found[f"axis of {name}"] = "the trace does not show the group (over gloo, the notes of Quadriga do)"
        if row["bytes_a_step"] is None:
            found[f"bytes of {name}"] = "the trace does not show the size of its tensors"
        if row["seconds_a_step"] is None:
            found[f"seconds of {name}"] = "the trace does not show where these calls ran"
        if why_not_comparable is None and row["transfer_s"] is None and row["axis"] != "host":
            found[f"transfer of {name}"] = "no call of it is in the traces of all ranks of its group"
    return found


def _warnings(ranks: list[RankResult], chosen: TraceSet, contradictions: int, matched: int) -> list[str]:
    found = [warning for rank in ranks for warning in rank.warnings]
    world, steps = _world_size(ranks), {tuple(step.number for step in rank.steps) for rank in ranks}
    if len(ranks) < world:
        found.append(f"traces of {len(ranks)} of {world} ranks are here: the other ranks are not known")
    if len(steps) > 1:
        found.append("the traces of the ranks are not of the same steps")
    if len(ranks[0].steps) < FEW_STEPS:
        found.append(f"{len(ranks[0].steps)} profiled steps are few: means of less than {FEW_STEPS} are not reliable")
    if missing := sum(rank.missing for rank in ranks):
        found.append(f"{missing} calls have no row on the device: they are counted, but without time")
    if contradictions:
        found.append(
            f"{contradictions} of {contradictions + matched} calls ended on one rank before another began them, by "
            "these clocks: they are excluded from transfers"
        )
    if any(call.found_by == NAME for rank in ranks for call in rank.calls):
        found.append("some communication was found only by the names of kernels: its bytes and groups are not known")
    if chosen.others:
        found.append(f"of several iterations this is {chosen.iteration}; also here: {list(chosen.others)} (--step N)")
    return found
