"""Which rank a run waits for, from what the ranks say of themselves, and the report on it. Pure: no clock, no store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quadriga import limits
from quadriga.errors import EXIT_STALLED, Fault, Problem, UserError, printable, shortened
from quadriga.reading import parse_json

STACK_LINES = 40  # of the late rank's stack, in the report
WHERE = "the rendezvous store"
MAX_NUMBER = 1 << 53  # of any number of a heartbeat: what a float holds exactly
FIELDS: Mapping[str, tuple[type, ...]] = {  # what JSON may hold for a field of this type
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
    """What a rank says of itself, time and again: `count` grows each time, so that silence shows.

    `seconds`: in its phase. `waits`: for how long it has waited for an operation of training, in seconds; None where it
    does not. `waits_in_host`: the same for host groups. `launched`: how many operations it has launched. `finished`: it
    trains no more. `no_progress`: before the first step has ended, for how long the rank has made no progress.
    `next_silent`: for how long the next rank has said nothing.
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
        """Raises UserError where the text, which anybody who reaches the store may have written, is no heartbeat."""
        return cls(**_checked(cls, _parsed(text, limits.HEARTBEAT_BYTES)))


@dataclass(frozen=True)
class HangReport:
    """A run that stands still: `late` is the rank that the others wait for, or None where that cannot be known.

    `silent`: the ranks that do not even send heartbeats. `reporter`: the rank that found out, which waits in
    `operation`. `waiting`: how many ranks wait; `late_waits`: whether the late one does. `began`: in seconds since the
    epoch. `same_host_rank`: a rank on the machine of a late rank that is silent. `starting`: the first step had not
    ended.
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
        """Raises UserError where the text, which anybody who reaches the store may have written, is no alarm."""
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
    """The facts, if they are those of the class, by name and type; their texts as a terminal may be sent them."""
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
    """The ranks that may have made progress in the last `limit` seconds of the start, or have done their first step.

    A call that lets no other thread run (an import, say) makes a rank silent: what it does meanwhile cannot be seen, so
    its silence counts as standstill.
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
    """For how long each silent rank has said nothing: as the rank before it says, and since when that one is silent."""
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

    One that is silent; else one that does not wait for others; else, as all wait, the one that has launched the fewest
    operations. Among several: the one at the earliest step, and then the longest in its phase.
    """
    here = [heartbeat for heartbeat in heartbeats.values() if not heartbeat.finished]
    held = [heartbeat for heartbeat in here if heartbeat.rank in silent] or [
        heartbeat for heartbeat in here if heartbeat.rank not in waiting
    ]
    if held:
        return min(held, key=lambda heartbeat: (heartbeat.rank in waiting, heartbeat.step, -heartbeat.seconds))
    return min(here, key=lambda heartbeat: (heartbeat.step, heartbeat.launched), default=None)


def rank_on_same_host(late: Heartbeat, heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...]) -> int | None:
    """The first rank on the machine of `late` that can look after it."""
    near = (
        rank
        for rank, heartbeat in heartbeats.items()
        if heartbeat.host == late.host and rank not in silent and not heartbeat.finished
    )
    return min((rank for rank in near if rank != late.rank), default=None)


def hang_fault(report: HangReport, stack: str, folder: str) -> Fault:
    """The report: who, where, since when, what the others wait in, the stack of the late rank, and what to do."""
    late, reporter = report.late, report.reporter
    lines = [_headline(report), ""]
    if late is not None:
        lines.append(f"    where     process {late.pid} on {late.host}")
        lines.append(f"    at        step {late.step}, phase {late.phase!r}, for {late.seconds:.0f} s as it last said")
        lines.append(f"    state     {_state(report, late)}")
    others = f"{report.waiting} of {report.world_size} ranks"
    if report.world_size > 1:
        place = f"(step {reporter.step}, {reporter.phase}) in {report.operation}"
        lines.append(f"    waiting   {others}; rank {reporter.rank} {place}")
    lines.append(f"    traces    {folder}: of each rank its stack and its last collectives")
    if late is not None:
        lines += ["", f"The stack of rank {late.rank}:", "", *(f"    {line}" for line in _of_main_thread(stack))]
    lines += ["", *_advice(report)]
    return Fault("\n".join(lines), EXIT_STALLED)


def _headline(report: HangReport) -> str:
    who = "the rendezvous store does not answer" if report.late is None else f"it waits for rank {report.late.rank}"
    if report.starting and report.late is not None:
        who = (
            f"nothing moves before its first step has ended; rank {report.late.rank} is in phase {report.late.phase!r}"
        )
    more = f" (ranks {', '.join(map(str, report.silent[:16]))} are silent)" if len(report.silent) > 1 else ""
    return f"the run has stood still for {report.seconds:.0f} s: {who}{more}"


def _state(report: HangReport, late: Heartbeat) -> str:
    if late.rank in report.silent:
        return "gives no sign: stopped, held in a call that lets no other thread run, or its machine is gone"
    if not report.late_waits:
        return "alive, and makes no progress" if report.starting else "alive, and not on its way to the others"
    return "alive, and it waits as all others do: the ranks may have called different collectives"


def _of_main_thread(stack: str) -> list[str]:
    """The part of faulthandler's output that shows the training itself."""
    threads = re.split(r"(?m)^(?=Thread 0x|Current thread 0x)", stack)
    own = next((thread for thread in threads if "loop.py" in thread), stack)
    return [printable(line) for line in own.strip().splitlines()[:STACK_LINES]] or ["(it could not be had)"]


def _advice(report: HangReport) -> list[str]:
    lines = ["Checkpoints that were finished before are whole: the same start goes on from the newest one."]
    if report.late is None or report.late.rank in report.silent:
        host = report.late.host if report.late else "the machine of rank 0"
        lines.append(f"If it happens on {host} again, look at its kernel log and take it out of the job.")
    else:
        key = "comm.init_timeout_seconds" if report.starting else "comm.train_timeout_seconds"
        lines.append(f"If the rank had good reason to be slow, raise {key}.")
    return lines
