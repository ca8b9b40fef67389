"""What training does not do yet: one line a feature. Training refuses it by name; a dry run checks it all the same.

To build a feature means to delete its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quadriga.config.case import Case, Clash
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem


@dataclass(frozen=True)
class Missing:
    """A feature that is not built: the keys that ask for it, how to tell, and what to do instead."""

    keys: tuple[str, ...]
    asked_for: Callable[[JobConfig], bool]
    feature: str
    instead: str


NOT_BUILT = (
    Missing(
        ("model.converters",),
        lambda config: bool(set(config.model.converters) - {"quantize.linear.float8"}),
        "microscaling formats and grouped products in 8 bits",
        'use "quantize.linear.float8" alone, or remove the converters',
    ),
    Missing(
        ("checkpoint.initial_load_in_hf_quantized",),
        lambda config: config.checkpoint.enable and config.checkpoint.initial_load_in_hf_quantized,
        "starting from quantized weights",
        "start from weights that are not quantized",
    ),
    Missing(
        ("optimizer.early_step_in_backward",),
        lambda config: config.optimizer.early_step_in_backward,
        "updating parameters within the backward pass",
        "set it to false",
    ),
    Missing(
        ("fault_tolerance.enable",),
        lambda config: config.fault_tolerance.enable,
        "training with replica groups that may fail on their own",
        "set it to false; a run that dies resumes from its newest checkpoint",
    ),
    Missing(
        ("comm.mode",),
        lambda config: config.comm.mode == "local_tensor",
        "all ranks in one process",
        'set it to "default" to train on the CPU with gloo, or to "fake_backend" to rehearse',
    ),
)


def unsupported(case: Case, bad: set[str]) -> Iterator[Problem | str]:
    """A problem for each feature that training would need and does not have; in a dry run a notice."""
    for missing in NOT_BUILT:
        if bad.intersection(missing.keys) or not missing.asked_for(case.config):
            continue
        if case.training:
            yield case.tell(missing.keys, Clash(f"training does not support {missing.feature} yet", missing.instead))
        else:
            yield f"training does not support {missing.feature} yet ({', '.join(missing.keys)})"
