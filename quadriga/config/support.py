"""What training does not do yet: one line a feature. Training refuses it by name; a dry run checks it all the same.

To build a feature means to delete its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quadriga.config.rules import Conflict, RuleContext
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


@dataclass(frozen=True)
class UnsupportedFeature:
    """A feature that is not built: the keys that ask for it, how to tell, and what to do instead."""

    keys: tuple[str, ...]
    requested: Callable[[JobConfig], bool]
    name: str
    instead: str


UNSUPPORTED = (
    UnsupportedFeature(
        ("model.converters",),
        lambda config: bool(set(config.model.converters) - {"quantize.linear.float8"}),
        "microscaling formats and grouped products in 8 bits",
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
        "training with replica groups that may fail on their own",
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
    """A problem for each feature that training would need and does not have; in a dry run a notice."""
    for feature in UNSUPPORTED:
        if bad.intersection(feature.keys) or not feature.requested(ctx.config):
            continue
        if ctx.training:
            yield ctx.to_problem(
                feature.keys, Conflict(f"training does not support {feature.name} yet", feature.instead)
            )
        else:
            yield f"training does not support {feature.name} yet ({', '.join(feature.keys)})"
