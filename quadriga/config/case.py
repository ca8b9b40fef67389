"""What the rules look at, and how a broken rule is told: every key that takes part, with its value and source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quadriga.config.keys import KEYS, show
from quadriga.config.model_spec import ModelSpec
from quadriga.config.run_spec import Degrees, TokenizerFacts
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


class BackendFacts(Protocol):
    """What is to be known of a communication backend: see `quadriga.comm.backend`."""

    @property
    def name(self) -> str: ...
    @property
    def carries(self) -> frozenset[str]: ...
    @property
    def beside(self) -> str | None: ...
    @property
    def hidden(self) -> bool: ...


@dataclass(frozen=True)
class Case:
    """A configuration and all that has been found out about it so far."""

    config: JobConfig
    origin: Mapping[str, str]
    model: ModelSpec
    degrees: Degrees
    tokenizer: TokenizerFacts
    backends: Mapping[str, BackendFacts]
    training: bool  # False: a dry run
    schedule_csv: str | None = None  # the text of `parallelism.pipeline_parallel_schedule_csv`

    def tell(self, keys: tuple[str, ...], clash: Clash) -> Problem:
        where = " and ".join(f"{key} = {self._shown(key)}" for key in keys)
        source = join_sources(self.origin.get(key, "default") for key in keys)
        return Problem(where, clash.what, None, source, clash.allowed, clash.nearest, clash.fix)

    def _shown(self, key: str) -> str:
        """The value that counts: of a dimension that is not overridden the flavor's, and of -1 what it stands for."""
        value = value_of(self.config, key)
        if key == "parallelism.data_parallel_shard_degree" and value == -1:
            return f"-1 (here {self.degrees.dp_shard})"
        if key.startswith("model.") and value is None:
            value = getattr(self.model, key.removeprefix("model."))
        return show(value)


def join_sources(sources: Iterable[str]) -> str:
    """Several sources as one text: lines of one file together, each source once."""
    places: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        name, _, line = source.partition(", line ")
        places.setdefault(name, []).extend([line] if line else [])
    return "; ".join(
        f"{name}, line{'s' * (len(lines) > 1)} {', '.join(lines)}" if lines else name for name, lines in places.items()
    )


def value_of(config: JobConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class Clash:
    """Why some keys do not go together."""

    what: str
    fix: str | None = None
    allowed: str | None = None
    nearest: str | None = None


Verdicts = Iterator[Clash | Problem | str]  # a text is a notice: worth saying, not wrong
Check = Callable[[Case], Verdicts]


@dataclass(frozen=True)
class Rule:
    """A check, and the keys that it is about: it is left out when one of them is wrong already."""

    keys: tuple[str, ...]
    check: Check

    def apply(self, case: Case) -> Iterator[Problem | str]:
        for verdict in self.check(case):
            yield case.tell(self.keys, verdict) if isinstance(verdict, Clash) else verdict


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Enter a check into the book of rules; the keys are named in its problems, in this order."""
    unknown = set(keys) - KEYS.keys()
    assert not unknown, f"a rule names keys that are not in the vocabulary: {unknown}"

    def enter(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return enter
