"""Registration and reports of rules between keys. A report has every key of the rule, with its value and source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.config.keys import KEYS, format_toml
from quadriga.config.model_spec import ModelSpec
from quadriga.config.run_spec import BackendFacts, Degrees, TokenizerFacts
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


@dataclass(frozen=True)
class RuleContext:
    """The input of a rule: a configuration, and what is known about its parts."""

    config: JobConfig
    origin: Mapping[str, str]
    model: ModelSpec
    degrees: Degrees
    tokenizer: TokenizerFacts
    backends: Mapping[str, BackendFacts]
    training: bool  # False: a dry run
    schedule_csv: str | None = None  # the text of `parallelism.pipeline_parallel_schedule_csv`

    def to_problem(self, keys: tuple[str, ...], conflict: Conflict) -> Problem:
        where = " and ".join(f"{key} = {self._format_value(key)}" for key in keys)
        source = join_sources(self.origin.get(key, "default") for key in keys)
        return Problem(where, conflict.what, None, source, conflict.allowed, conflict.nearest, conflict.fix)

    def _format_value(self, key: str) -> str:
        """The effective value: the flavor's if a dimension is not overridden, and -1 with the degree it stands for."""
        value = config_value(self.config, key)
        if key == "parallelism.data_parallel_shard_degree" and value == -1:
            return f"-1 (here {self.degrees.dp_shard})"
        if key.startswith("model.") and value is None:
            value = getattr(self.model, key.removeprefix("model."))
        return format_toml(value)


def join_sources(sources: Iterable[str]) -> str:
    """Several sources as one text: each source once, and the lines of one file together."""
    places: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        name, _, line = source.partition(", line ")
        places.setdefault(name, []).extend([line] if line else [])
    return "; ".join(
        f"{name}, line{'s' * (len(lines) > 1)} {', '.join(lines)}" if lines else name for name, lines in places.items()
    )


def config_value(config: JobConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class Conflict:
    """Why the values of some keys do not fit together."""

    what: str
    fix: str | None = None
    allowed: str | None = None
    nearest: str | None = None


Findings = Iterator[Conflict | Problem | str]  # a text is a notice, not an error
Check = Callable[[RuleContext], Findings]


@dataclass(frozen=True)
class Rule:
    """A check and its keys. It is skipped if one of them is already wrong."""

    keys: tuple[str, ...]
    check: Check

    def apply(self, ctx: RuleContext) -> Iterator[Problem | str]:
        for finding in self.check(ctx):
            yield ctx.to_problem(self.keys, finding) if isinstance(finding, Conflict) else finding


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check. Its problems name the keys in this order."""
    unknown = set(keys) - KEYS.keys()
    assert not unknown, f"a rule names unknown keys: {unknown}"

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return register
