"""Features that training does not support yet, one entry each. Training refuses them by name; a dry run accepts them.

Delete the entry when a feature is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quadriga.config.rules import Conflict, RuleContext
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


@dataclass(frozen=True)
class UnsupportedFeature:
    """A feature that is not supported: its keys, whether a configuration requests it, and what to do instead."""

    keys: tuple[str, ...]
    requested: Callable[[JobConfig], bool]
    name: str
    instead: str


UNSUPPORTED = (
    UnsupportedFeature(
        ("model.converters",),
        lambda config: bool(set(config.model.converters) - {"quantize.linear.float8"}),
        "microscaling formats and grouped matrix products in 8 bits",
        'use "quantize.linear.float8" alone, or remove the converters',
    ),
    UnsupportedFeature(
        ("checkpoint.initial_load_in_hf_quantized",),
        lambda config: config.checkpoint.enable and config.checkpoint.initial_load_in_hf_quantized,
        "starting from quantized weights",
        "start from weights that are not quantized",
    ),
    UnsupportedFeature(
        ("optimizer.early_step_in_backward",),
        lambda config: config.optimizer.early_step_in_backward,
        "updating parameters within the backward pass",
        "set it to false",
    ),
    UnsupportedFeature(
        ("fault_tolerance.enable",),
        lambda config: config.fault_tolerance.enable,
        "replica groups that can fail independently",
        "set it to false; a run that dies resumes from its newest checkpoint",
    ),
    UnsupportedFeature(
        ("comm.mode",),
        lambda config: config.comm.mode == "local_tensor",
        "all ranks in one process",
        'set it to "default" to train on the CPU with gloo, or to "fake_backend" to rehearse',
    ),
)


def unsupported_features(ctx: RuleContext, bad: set[str]) -> Iterator[Problem | str]:
    """A problem for each requested feature that training does not support; a notice in a dry run."""
    for feature in UNSUPPORTED:
        if bad.intersection(feature.keys) or not feature.requested(ctx.config):
            continue
        if ctx.training:
            yield ctx.to_problem(
                feature.keys, Conflict(f"training does not support {feature.name} yet", feature.instead)
            )
        else:
            yield f"training does not support {feature.name} yet ({', '.join(feature.keys)})"
