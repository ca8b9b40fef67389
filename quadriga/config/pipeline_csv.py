"""Reads and checks a pipeline schedule in a CSV file, in the `compute_only` format of torch's `_load_csv`.

Line *r* has the actions of pipeline rank *r* in order, one per cell: stage, kind, micro-batch. `2F0` is the forward
pass of micro-batch 0 through stage 2. `B` is a whole backward pass; `I` and `W` are its two parts, the gradients of the
stage's input and of its weights. An empty cell waits. `(0F1;0B0)OVERLAP_F_B` runs two actions at the same time.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from quadriga.config.pipeline_order import Action, PipelineOrder
from quadriga.errors import shortened
from quadriga.limits import CSV_PROBLEMS

_ACTION = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
FORMS = "cells such as 2F0 (stage 2, forward, micro-batch 0), with F, B, I or W"


@dataclass(frozen=True)
class ScheduleProblem:
    """What is wrong, and in which line of the file (from 1); None: in the whole file."""

    what: str
    line: int | None = None


def parse(text: str, ranks: int, micro_batches: int) -> PipelineOrder | list[ScheduleProblem]:
    """The schedule, or all problems that it has for this number of ranks and micro-batches."""
    rows, reader = list[list[str]](), csv.reader(io.StringIO(text, newline=None))
    try:
        for row in reader:
            rows.append(row)
            if reader.line_num > len(rows):
                return [ScheduleProblem("a quoted cell contains the end of a line", len(rows))]
    except csv.Error as error:  # a cell of more than 131,072 characters
        return [ScheduleProblem(f"not a CSV file: {error}", reader.line_num)]
    unreadable = (
        ScheduleProblem(f"`{shortened(cell.strip())}` is not an action", line)
        for line, row in enumerate(rows, 1)
        for cell in row
        if _actions(cell) is None
    )
    problems = list(islice(unreadable, CSV_PROBLEMS))
    if len(rows) != ranks:
        problems.insert(
            0, ScheduleProblem(f"a schedule has one line per rank; there are {len(rows)} lines and {ranks} ranks")
        )
    if problems:
        return problems
    schedule = PipelineOrder(tuple(tuple(action for cell in row for action in _actions(cell) or ()) for row in rows))
    found = (
        islice(_stage_problems(schedule), CSV_PROBLEMS),
        islice(_action_problems(schedule, micro_batches), CSV_PROBLEMS),
    )
    return list(found[0]) or list(found[1]) or schedule


def _actions(cell: str) -> list[Action] | None:
    """The actions of a cell; None if it cannot be parsed."""
    overlap = _OVERLAP.fullmatch(cell.strip())
    parts = overlap[1].split(";") if overlap else [cell]
    found = [_ACTION.fullmatch(part.strip()) for part in parts if part.strip()]
    return None if None in found else [Action(int(m[1]), m[2], int(m[3])) for m in found if m]


def _stage_problems(schedule: PipelineOrder) -> Iterator[ScheduleProblem]:
    """Stages are 0, 1, 2, ... without a gap. Each is computed by one rank, and each rank computes at least one."""
    owners: dict[int, int] = {}
    for line, actions in enumerate(schedule.ranks, 1):
        if not actions:
            yield ScheduleProblem("this rank computes nothing", line)
        for stage in sorted({action.stage for action in actions}):
            if owners.setdefault(stage, line) != line:
                yield ScheduleProblem(f"stage {stage} is computed by line {owners[stage]} already", line)
    gap = next(stage for stage in range(len(owners) + 1) if stage not in owners)
    if gap < len(owners):
        yield ScheduleProblem(f"no line computes stage {gap}, and there are higher stages")


def _action_problems(schedule: PipelineOrder, micro_batches: int) -> Iterator[ScheduleProblem]:
    """Each stage computes each micro-batch forward once, then backward once, and there is no deadlock."""
    for line, actions in enumerate(schedule.ranks, 1):
        done: set[Action] = set()
        for action in actions:
            if (what := _out_of_order(action, done, micro_batches)) is not None:
                yield ScheduleProblem(f"{action}: {what}", line)
            done.add(action)
        for stage in sorted({action.stage for action in actions}):
            for each in range(micro_batches):
                if not {Action(stage, "B", each), Action(stage, "W", each)} & done:
                    yield ScheduleProblem(
                        f"stage {stage} does not finish the backward pass of micro-batch {each}", line
                    )
                    break
    if deadlock := schedule.deadlock:
        waits = ", ".join(f"{action} in line {rank + 1}" for rank, action in deadlock)
        yield ScheduleProblem(f"deadlock, in which ranks wait for each other: {waits}")


def _out_of_order(action: Action, done: set[Action], micro_batches: int) -> str | None:
    """Why this action cannot follow the actions that its rank has done; None if it can."""

    def is_done(kind: str) -> bool:
        return Action(action.stage, kind, action.micro_batch) in done

    if action.micro_batch >= micro_batches:
        return f"there are only {micro_batches} micro-batches, counted from 0"
    if action in done or (action.kind in "BI" and (is_done("B") or is_done("I"))):
        return "it is done already"
    if action.kind in "BI" and not is_done("F"):
        return "its forward pass is not before it"
    if action.kind == "W" and not is_done("I"):
        return "its I is not before it"
    return None


def format_problems(problems: Sequence[ScheduleProblem], path: str) -> list[tuple[str, str]]:
    """(where, what) of each problem."""
    return [(path if problem.line is None else f"{path}, line {problem.line}", problem.what) for problem in problems]
