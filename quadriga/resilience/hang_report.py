"""Finds the rank that a hung run waits for, from the ranks' heartbeats, and formats the report. No clock, no store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quadriga import limits
from quadriga.errors import EXIT_STALLED, Fault, Problem, UserError, printable, shortened
from quadriga.reading import parse_json

STACK_LINES = 40  # lines of the late rank's stack in the report
WHERE = "the rendezvous store"
MAX_NUMBER = 1 << 53  # limit of every number in a heartbeat: a float holds integers up to here exactly
FIELDS: Mapping[str, tuple[type, ...]] = {  # annotation of a field: the types that its JSON value may have
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "tuple[int, ...]": (list,),
    "Heartbeat": (dict,),
    "Heartbeat | None": (dict, type(None)),
}


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, which it sends periodically. All times are in seconds.

    `count` grows with each heartbeat: a rank whose count does not change is silent. `seconds`: time in its phase.
    `waits`: how long it has waited for an operation of training; None if it does not wait. `waits_in_host`: the same
    for host groups. `launched`: number of operations launched. `finished`: it no longer trains. `no_progress`: time
    without progress, before the end of the first step. `next_silent`: time since a heartbeat of the next rank.
    """

    rank: int
    host: str
    pid: int
    count: int = 0
    step: int = 0
    phase: str = ""
    seconds: float = 0.0
    waits: float | None = None
    waits_in_host: float | None = None
    launched: int = 0
    finished: bool = False
    no_progress: float | None = None
    next_silent: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Heartbeat:
        """Raises UserError if the text is no heartbeat: any process that reaches the store may have written it."""
        return cls(**_checked(cls, _parsed(text, limits.HEARTBEAT_BYTES)))


@dataclass(frozen=True)
class HangReport:
    """A run that makes no progress: `late` is the rank that the others wait for, or None if it is unknown.

    `silent`: ranks that send no heartbeats. `reporter`: the rank that detected the hang, which waits in `operation`.
    `waiting`: number of ranks that wait. `late_waits`: whether the late rank waits too. `seconds`: how long there was
    no progress. `began`: in seconds since the epoch. `same_host_rank`: a rank on the machine of the late rank, to read
    the stack of a silent one. `starting`: the first step had not ended.
    """

    late: Heartbeat | None
    silent: tuple[int, ...]
    reporter: Heartbeat
    operation: str
    waiting: int
    late_waits: bool
    world_size: int
    seconds: float
    began: float
    same_host_rank: int | None
    starting: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> HangReport:
        """Raises UserError if the text is no alarm: any process that reaches the store may have written it."""
        facts = _checked(cls, _parsed(text, limits.HANG_REPORT_BYTES))
        late = None if facts["late"] is None else Heartbeat(**_checked(Heartbeat, facts["late"]))
        reporter = Heartbeat(**_checked(Heartbeat, facts["reporter"]))
        if not all(type(rank) is int and abs(rank) <= MAX_NUMBER for rank in facts["silent"]):
            raise _refusal("silent: not a list of ranks")
        return cls(**{**facts, "late": late, "reporter": reporter, "silent": tuple(facts["silent"])})


def _parsed(text: bytes, most: int) -> Any:
    if len(text) > most:
        raise _refusal(f"{len(text)} bytes; at most {most} are read")
    return parse_json(text, WHERE)


def _checked(cls: type, facts: Any) -> dict[str, Any]:
    """The facts, if their names and types are the class's fields; strings without control characters."""
    kinds = {field.name: FIELDS[str(field.type)] for field in fields(cls)}
    if not isinstance(facts, dict) or facts.keys() != kinds.keys():
        raise _refusal(f"not the fields of a {cls.__name__}")
    for name, value in facts.items():
        if type(value) not in kinds[name] or (isinstance(value, int | float) and not abs(value) <= MAX_NUMBER):
            raise _refusal(f"{name}: {shortened(value)}")
    return {name: printable(value) if isinstance(value, str) else value for name, value in facts.items()}


def _refusal(what: str) -> UserError:
    return UserError(Problem(WHERE, what))


def silent_ranks(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]) -> tuple[int, ...]:
    """The ranks that have sent no heartbeat between two readings."""
    return tuple(
        rank for rank, heartbeat in after.items() if heartbeat.count == before[rank].count and not heartbeat.finished
    )


def moving_ranks(heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...], limit: float) -> tuple[int, ...]:
    """The ranks that may have made progress in the last `limit` seconds of the start, or have ended their first step.

    A call that holds the GIL (an import, for example) makes a rank silent. Its activity is then unknown, so the time of
    silence counts as time without progress.
    """
    silence = _silence(heartbeats, silent)
    return tuple(
        rank
        for rank, heartbeat in heartbeats.items()
        if not heartbeat.finished
        and (
            (heartbeat.no_progress or 0.0) + silence[rank] <= limit
            if rank in silent
            else heartbeat.count > 0 and (heartbeat.no_progress is None or heartbeat.no_progress <= limit)
        )
    )


def _silence(heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...]) -> dict[int, float]:
    """Seconds of silence of each silent rank: as the rank before it measured, plus that rank's own silence."""
    seconds: dict[int, float] = {}
    for rank in sorted(silent):
        past, before = 0.0, rank
        for _ in range(len(heartbeats)):
            before = (before - 1) % len(heartbeats)
            if before in seconds:
                past += heartbeats[before].next_silent + seconds[before]
                break
            past += heartbeats[before].next_silent
            if before not in silent:
                break
        seconds[rank] = past
    return seconds


def waiting_ranks(heartbeats: Mapping[int, Heartbeat], host: bool) -> set[int]:
    """The ranks that wait for others, in training or in a host group."""
    return {
        rank
        for rank, heartbeat in heartbeats.items()
        if (heartbeat.waits_in_host if host else heartbeat.waits) is not None
    }


def late_rank(heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...], waiting: set[int]) -> Heartbeat | None:
    """The rank that the others wait for.

    A silent rank; else a rank that does not wait; else, if all wait, the one that has launched the fewest operations.
    Of several, the one at the earliest step, and then the one that has been longest in its phase.
    """
    here = [heartbeat for heartbeat in heartbeats.values() if not heartbeat.finished]
    held = [heartbeat for heartbeat in here if heartbeat.rank in silent] or [
        heartbeat for heartbeat in here if heartbeat.rank not in waiting
    ]
    if held:
        return min(held, key=lambda heartbeat: (heartbeat.rank in waiting, heartbeat.step, -heartbeat.seconds))
    return min(here, key=lambda heartbeat: (heartbeat.step, heartbeat.launched), default=None)


def rank_on_same_host(late: Heartbeat, heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...]) -> int | None:
    """The first responsive rank on the machine of `late`, which can read its stack and kill it."""
    near = (
        rank
        for rank, heartbeat in heartbeats.items()
        if heartbeat.host == late.host and rank not in silent and not heartbeat.finished
    )
    return min((rank for rank in near if rank != late.rank), default=None)


def hang_fault(report: HangReport, stack: str, folder: str) -> Fault:
    """The report: which rank, where, since when, the operation in which others wait, its stack, and a remedy."""
    late, reporter = report.late, report.reporter
    lines = [_headline(report), ""]
    if late is not None:
        lines.append(f"    where     process {late.pid} on {late.host}")
        lines.append(f"    at        step {late.step}, phase {late.phase!r}, for {late.seconds:.0f} s (last heartbeat)")
        lines.append(f"    state     {_state(report, late)}")
    others = f"{report.waiting} of {report.world_size} ranks"
    if report.world_size > 1:
        place = f"(step {reporter.step}, {reporter.phase}) in {report.operation}"
        lines.append(f"    waiting   {others}; rank {reporter.rank} {place}")
    lines.append(f"    traces    {folder}: the stack and the last collectives of each rank")
    if late is not None:
        lines += ["", f"The stack of rank {late.rank}:", "", *(f"    {line}" for line in _of_main_thread(stack))]
    lines += ["", *_advice(report)]
    return Fault("\n".join(lines), EXIT_STALLED)


def _headline(report: HangReport) -> str:
    who = "the rendezvous store does not answer" if report.late is None else f"it waits for rank {report.late.rank}"
    if report.starting and report.late is not None:
        who = f"the first step has not ended; rank {report.late.rank} is in phase {report.late.phase!r}"
    more = f" (ranks {', '.join(map(str, report.silent[:16]))} are silent)" if len(report.silent) > 1 else ""
    return f"the run has made no progress for {report.seconds:.0f} s: {who}{more}"


def _state(report: HangReport, late: Heartbeat) -> str:
    if late.rank in report.silent:
        return "sends no heartbeat: stopped, in a call that holds the GIL, or its machine is gone"
    if not report.late_waits:
        return "alive, and makes no progress" if report.starting else "alive, and does not wait for others"
    return "alive, and waits as all other ranks do: the ranks may have called different collectives"


def _of_main_thread(stack: str) -> list[str]:
    """The part of faulthandler's output for the thread that trains."""
    threads = re.split(r"(?m)^(?=Thread 0x|Current thread 0x)", stack)
    own = next((thread for thread in threads if "loop.py" in thread), stack)
    return [printable(line) for line in own.strip().splitlines()[:STACK_LINES]] or ["(not available)"]


def _advice(report: HangReport) -> list[str]:
    lines = ["Checkpoints that were finished before are complete: the same command resumes from the newest one."]
    if report.late is None or report.late.rank in report.silent:
        host = report.late.host if report.late else "the machine of rank 0"
        lines.append(f"If it happens on {host} again, read its kernel log and exclude it from the job.")
    else:
        key = "comm.init_timeout_seconds" if report.starting else "comm.train_timeout_seconds"
        lines.append(f"If the rank was only slow, raise {key}.")
    return lines
