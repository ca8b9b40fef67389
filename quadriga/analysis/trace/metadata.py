"""Metadata of a trace besides its events: rank, start time, process groups, and Quadriga's notes.

Each value is validated once, here. A value that neither torch nor `quadriga.comm.trace_notes` writes is ignored, with a
warning that names it. Figures that depend on it are then not measurable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from quadriga import limits
from quadriga.analysis.trace import fields
from quadriga.reading import json_type

NOTES_KEY = "quadriga"
STEP_NUMBER = partial(fields.whole_number, most=2**53)
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """A process group. `purpose`: torch's description of it; `ranks`: () if unknown."""

    purpose: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Notes:
    """The notes of Quadriga (docs/traces.md). `launches`: (ns since 1970, group, number) of calls."""

    first_step: int = 0
    attempt: int | None = None
    machine: str | None = None
    messages: str | None = None
    axes: Mapping[str, str] = field(default_factory=dict)
    axis_aliases: Mapping[str, str] = field(default_factory=dict)
    launches: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True)
class Metadata:
    """`base_ns`: the origin of times, in ns since 1970."""

    rank: int | None
    world_size: int | None
    machine: str | None
    backend: str | None
    base_ns: int | None
    groups: Mapping[str, ProcessGroup]
    notes: Notes
    warnings: list[str]


class _Section:
    """An object of the metadata, whose values are validated one by one."""

    def __init__(self, name: str, value: Any, warnings: list[str]) -> None:
        self._name, self._warnings = name, warnings
        if value is not None and not isinstance(value, dict):
            warnings.append(f"{name} is a JSON {json_type(value)}, not an object, and is ignored")
        self._values: Mapping[str, Any] = value if isinstance(value, dict) else {}

    def get(self, key: str, check: Callable[[str, Any], T]) -> T | None:
        """The validated value; None if it is missing, or invalid, which adds a warning."""
        value = self._values.get(key)
        if value is None:
            return None
        try:
            return check(key, value)
        except fields.FieldError as error:
            self._warnings.append(f"{self._name}: {error}; it is ignored")
            return None


def read_metadata(metadata: Mapping[str, Any], file: str) -> Metadata:
    """The metadata of a trace. `file`: its name in warnings."""
    warnings: list[str] = []
    outer = _Section(file, dict(metadata), warnings)
    group = _Section(f"{file}: distributedInfo", metadata.get("distributedInfo"), warnings)
    notes = read_notes(_Section(f"{file}: {NOTES_KEY}", metadata.get(NOTES_KEY), warnings))
    return Metadata(
        rank=group.get("rank", partial(fields.whole_number, most=limits.RANKS - 1)),
        world_size=group.get("world_size", partial(fields.whole_number, least=1, most=limits.RANKS)),
        machine=outer.get("host_name", fields.text) or notes.machine,
        backend=group.get("backend", fields.text),
        base_ns=outer.get("baseTimeNanoseconds", fields.whole_number),
        groups=group.get("pg_config", _groups) or {},
        notes=notes,
        warnings=warnings,
    )


def read_notes(part: _Section) -> Notes:
    return Notes(
        first_step=part.get("first_step", STEP_NUMBER) or 0,
        attempt=part.get("attempt", STEP_NUMBER),
        machine=part.get("machine", fields.text),
        messages=part.get("messages", fields.text),
        axes=part.get("axes", _texts) or {},
        axis_aliases=part.get("same", _texts) or {},
        launches=part.get("launches", _launches) or (),
    )


def _texts(what: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise fields.FieldError(f"{what} is a JSON {json_type(value)}, not an object")
    return {key: fields.text(f"{what}, {key}", each) for key, each in value.items()}


def _launches(what: str, value: Any) -> tuple[tuple[int, str, int], ...]:
    if not isinstance(value, list):
        raise fields.FieldError(f"{what} is a JSON {json_type(value)}, not a list")
    found = []
    for each in value:
        if not isinstance(each, list) or len(each) != 3:
            raise fields.FieldError(f"an element of {what} is not [time, group, number]")
        moment, group, number = each
        found.append((fields.whole_number(what, moment), fields.text(what, group), fields.whole_number(what, number)))
    return tuple(found)


def _groups(what: str, value: Any) -> dict[str, ProcessGroup]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise fields.FieldError(f"{what} is not a list of objects")
    groups = {}
    for each in value:
        name = fields.text("pg_name", each.get("pg_name", ""))
        purpose = fields.text("pg_desc", each.get("pg_desc") or "")
        groups[name] = ProcessGroup(purpose, fields.ranks_of(each.get("ranks") or []))
    return groups
