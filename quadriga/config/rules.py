"""What the rules look at, and how a broken rule is reported: every key that takes part, with its value and source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quadriga.config.keys import KEYS, format_toml
from quadriga.config.model_spec import ModelSpec
from quadriga.config.run_spec import Degrees, TokenizerFacts
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


class BackendProtocol(Protocol):
    """What is to be known of a communication backend: see `quadriga.comm.backend`."""

    @property
    def name(self) -> str: ...
    @property
    def carries(self) -> frozenset[str]: ...
    @property
    def fallback_backend(self) -> str | None: ...
    @property
    def hidden(self) -> bool: ...


@dataclass(frozen=True)
class RuleContext:
    """A configuration and all that has been found out about it so far."""

    config: JobConfig
    origin: Mapping[str, str]
    model: ModelSpec
    degrees: Degrees
    tokenizer: TokenizerFacts
    backends: Mapping[str, BackendProtocol]
    training: bool  # False: a dry run
    schedule_csv: str | None = None  # the text of `parallelism.pipeline_parallel_schedule_csv`

    def to_problem(self, keys: tuple[str, ...], conflict: Conflict) -> Problem:
        where = " and ".join(f"{key} = {self._format_value(key)}" for key in keys)
        source = join_sources(self.origin.get(key, "default") for key in keys)
        return Problem(where, conflict.what, None, source, conflict.allowed, conflict.nearest, conflict.fix)

    def _format_value(self, key: str) -> str:
        """The value that counts: of a dimension that is not overridden the flavor's, and of -1 what it stands for."""
        value = config_value(self.config, key)
        if key == "parallelism.data_parallel_shard_degree" and value == -1:
            return f"-1 (here {self.degrees.dp_shard})"
        if key.startswith("model.") and value is None:
            value = getattr(self.model, key.removeprefix("model."))
        return format_toml(value)


def join_sources(sources: Iterable[str]) -> str:
    """Several sources as one text: lines of one file together, each source once."""
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
    """Why some keys do not go together."""

    what: str
    fix: str | None = None
    allowed: str | None = None
    nearest: str | None = None


Findings = Iterator[Conflict | Problem | str]  # a text is a notice: worth saying, not wrong
Check = Callable[[RuleContext], Findings]


@dataclass(frozen=True)
class Rule:
    """A check, and the keys that it is about: it is left out when one of them is wrong already."""

    keys: tuple[str, ...]
    check: Check

    def apply(self, ctx: RuleContext) -> Iterator[Problem | str]:
        for finding in self.check(ctx):
            yield ctx.to_problem(self.keys, finding) if isinstance(finding, Conflict) else finding


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check; the keys are named in its problems, in this order."""
    unknown = set(keys) - KEYS.keys()
    assert not unknown, f"a rule names keys that are not in the vocabulary: {unknown}"

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return register
