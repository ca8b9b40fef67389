"""All keys of the configuration in one flat table: type as text, default, parser of command-line values. And TOML."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from quadriga.config.schema import JobConfig, Section
from quadriga.errors import UserError
from quadriga.reading import parse_json, parse_toml

NUMBER = re.compile(r"-?[0-9._]+([eE][-+]?[0-9]+)?|-?(inf|nan)")  # of ASCII, and with _ between digits as in TOML


@dataclass(frozen=True)
class Key:
    """One key of the configuration: `name` is `section.key`, `field` its definition in the schema."""

    name: str
    section: type[Section]
    field: FieldInfo

    @property
    def default(self) -> Any:
        return self.field.default

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, except `None`."""
        return tuple(kind for kind in _union_members(self.field.annotation) if kind is not types.NoneType)

    @property
    def optional(self) -> bool:
        return types.NoneType in _union_members(self.field.annotation)

    @property
    def plain_types(self) -> tuple[Any, ...]:
        """`kinds` without limits: `int` for a number of at least 1."""
        return tuple(_unwrap_annotated(kind, [])[0] for kind in self.kinds)

    @property
    def boolean(self) -> bool:
        return bool in self.kinds

    @property
    def item(self) -> type[Section] | None:
        """The section of each table, if the value is a list of tables."""
        inside = [argument for kind in self.kinds for argument in typing.get_args(kind)[:1]]
        return next((kind for kind in inside if is_section(kind)), None)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if only some are allowed (also as items of a list)."""
        return tuple(choice for kind in self.kinds for choice in _choices(kind))

    @property
    def allowed(self) -> str:
        """The allowed values, as text."""
        text = self.field.title or " or ".join(_describe(kind, self.field.metadata) for kind in self.kinds)
        if self.field.examples:
            text += ", such as " + " or ".join(format_toml(example) for example in self.field.examples)
        return f"{text}, or none" if self.optional else text


def _flatten(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        full = f"{prefix}{name}"
        if is_section(field.annotation):
            yield from _flatten(typing.cast(type[Section], field.annotation), full + ".")
        else:
            yield Key(full, section, field)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def parse_value(key: Key, text: str) -> Any:
    """The value of a text from the command line or a variable; the text itself if it is not a value of that type.

    Lists are comma-separated, or literals of TOML or JSON.
    """
    kinds = key.plain_types
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return _parse_list(text)
    for number in (int, float):
        if number in kinds:
            try:
                return number(text) if NUMBER.fullmatch(text) else text
            except ValueError:
                return text
    return text


def _parse_list(text: str) -> Any:
    if text.lstrip().startswith("["):
        try:
            found = parse_toml(f"it = {text}", "command line")
            return found["it"] if len(found) == 1 else text
        except UserError:
            pass
        try:
            return parse_json(text, "command line")
        except UserError:
            return text
    return [item.strip() for item in text.split(",") if item.strip()]


def format_toml(value: Any) -> str:
    """A value in TOML's syntax; `none` for an optional key that is off. Of a table of a list, the keys that are set."""
    if value is None:
        return "none"
    if isinstance(value, Section):
        return format_toml(value.model_dump(exclude_defaults=True))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {format_toml(item)}" for name, item in value.items()) + "}"
    return str(value)


def to_toml(config: JobConfig) -> str:
    """A configuration as TOML, which reads as the same configuration: every key with its value, including defaults. An
    optional key that is off is written as `"none"`."""
    tables = config.model_dump(mode="json")
    del tables["job"]["config_file"]  # the path that it was read from is not part of the configuration
    header = "# The resolved configuration: every key with its effective value.\n\n"
    return header + tomli_w.dumps(_without_none(tables))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items()}
    if isinstance(value, list):  # of tables, in which a key that is off is left out
        return [_set_keys(item) for item in value]
    return "none" if value is None else value


def _set_keys(item: Any) -> Any:
    return {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else item


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _unwrap_annotated(kind: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """(plain type, all metadata) of an annotated type."""
    if typing.get_origin(kind) is typing.Annotated:
        plain, *extra = typing.get_args(kind)
        details = [part for item in extra for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return plain, [*metadata, *details]
    return kind, metadata


def _choices(kind: Any) -> tuple[str, ...]:
    kind, _ = _unwrap_annotated(kind, [])
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return _choices(typing.get_args(kind)[0])
    return ()


def _describe(kind: Any, metadata: list[Any]) -> str:
    kind, metadata = _unwrap_annotated(kind, metadata)
    if choices := _choices(kind) if typing.get_origin(kind) is Literal else ():
        return " | ".join(format_toml(choice) for choice in choices)
    if typing.get_origin(kind) is tuple:
        return f"a list of {_plural(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a table of names and numbers"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text"
    limits = " and ".join(_describe_bound(item) for item in metadata if isinstance(item, Ge | Gt | Le | Lt))
    noun = "a whole number" if kind is int else "a number"
    if any(isinstance(item, AfterValidator) for item in metadata):  # the schema's only validator: -1, or a count
        return f"-1, or {noun} of at least 1"
    return f"{noun} {limits}" if limits else noun


def _plural(kind: Any) -> str:
    kind, _ = _unwrap_annotated(kind, [])
    if typing.get_origin(kind) is tuple:
        return f"lists of {_plural(typing.get_args(kind)[0])}"
    return " | ".join(format_toml(choice) for choice in _choices(kind)) or "names"


def _describe_bound(limit: Ge | Gt | Le | Lt) -> str:
    match limit:
        case Ge(bound):
            return f"of at least {bound}"
        case Gt(bound):
            return f"above {bound}"
        case Le(bound):
            return f"of at most {bound}"
        case Lt(bound):
            return f"below {bound}"


KEYS: Mapping[str, Key] = {key.name: key for key in _flatten(JobConfig, "")}
# The keys of the tables of a list, as `training.sources[].weight`. Only whole lists have a source and a command line.
ITEM_KEYS: Mapping[str, Key] = {
    inner.name: inner for key in KEYS.values() if key.item for inner in _flatten(key.item, f"{key.name}[].")
}
