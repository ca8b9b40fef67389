"""The shares of the sources of a mixture, in each of its stages: exact decimals, rounded to millionths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from quadriga.config.schema import Training, TrainingSource

PARTS = 10**6  # a share is a number of millionths, so a period has at most so many slots


@dataclass(frozen=True)
class StageShares:
    """The shares from step `first` on, in millionths (`shares`); 0 for a source that is not read."""

    first: int
    parts: tuple[int, ...]


def mixture_stages(
    training: Training, tokens_per_step: int, epoch_tokens: Mapping[str, int]
) -> tuple[StageShares, ...]:
    """The stages of a valid mixture. `epoch_tokens`: by name, the tokens in one epoch of each source with `epochs`."""
    names = [source.title for source in training.sources]
    stages = [StageShares(0, shares([_amount(source, epoch_tokens) for source in training.sources]))]
    for stage in training.stages:
        weights = [_exact(stage.weights.get(name, 0)) for name in names]
        stages.append(StageShares(stage.first_step(tokens_per_step), shares(weights)))
    return tuple(stages)


def _amount(source: TrainingSource, epoch_tokens: Mapping[str, int]) -> Decimal:
    """The weight of a source, or its number of tokens."""
    if source.epochs is not None:
        return _exact(source.epochs) * epoch_tokens[source.title]
    return _exact(source.tokens if source.weight is None else source.weight)


def _exact(number: float | None) -> Decimal:
    """The decimal number that was written: the shortest one that has this binary value."""
    return Decimal(repr(number or 0))


def shares(amounts: Sequence[Decimal]) -> tuple[int, ...]:
    """The shares of some amounts (weights, or numbers of tokens) in millionths, with the sum `PARTS`.

    Shares are rounded down, and the largest remainders get what is left (Hamilton's method). An amount above 0 has at
    least one millionth: a source with a smaller share would never be read. Raises ValueError: an amount that is
    negative or not finite, none above 0, or more of them than millionths.
    """
    valid = all(amount.is_finite() and amount >= 0 for amount in amounts)
    positive = [amount for amount in amounts if amount > 0] if valid else []
    if not 0 < len(positive) <= PARTS:
        raise ValueError(f"amounts must not be negative, and one must be positive: {', '.join(map(str, amounts))}")
    rounded = iter(_positive_shares(positive))
    return tuple(next(rounded) if amount > 0 else 0 for amount in amounts)


def _positive_shares(amounts: Sequence[Decimal]) -> list[int]:
    total = sum(amounts)
    exact = [amount * PARTS / total for amount in amounts]
    parts = [max(int(share.to_integral_value(rounding=ROUND_FLOOR)), 1) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda source: (parts[source] - exact[source], source))
    for source in by_remainder[: max(PARTS - sum(parts), 0)]:
        parts[source] += 1
    while sum(parts) > PARTS:  # sources below one millionth were rounded up
        parts[max(range(len(parts)), key=lambda source: (parts[source], -source))] -= 1
    return parts


def format_percent(parts: int) -> str:
    """A share in millionths as per cent, exactly."""
    text = f"{parts // 10_000}.{parts % 10_000:04d}".rstrip("0").rstrip(".")
    return f"{text} %"


def format_mixture(training: Training) -> str:
    """The sources as the configuration gives them, without the size of any file."""
    given = []
    for source in training.sources:
        (name, value), *_ = source.amounts.items()
        if name == "weight":
            given.append(f"{source.title} {format_percent(_share_of(training, source))}")
        else:
            given.append(f"{source.title} {value:,} {name}")
    steps = f", in {len(training.stages) + 1} stages" if training.stages else ""
    return f"a mixture of {', '.join(given)}{steps}"


def _share_of(training: Training, source: TrainingSource) -> int:
    return mixture_stages(training, 1, {})[0].parts[training.sources.index(source)]
