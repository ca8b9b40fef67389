"""[optimizer] and [lr_scheduler]: the update of weights, and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.config.schema.section import Amount, Beta, Count, NonNegative, Positive, Section, Share

# Elements of a rank's shards that an update with a separate dtype of the moments processes at a time.
UPDATE_BUCKET = 1 << 24


class Optimizer(Section):
    """The optimizer and its constants."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Adam (weight decay added to the gradient) or AdamW (weight decay applied to the weight)."""

    lr: Positive = 8e-4
    """Peak learning rate."""

    beta1: Beta = 0.9
    """Decay of the first moment."""

    beta2: Beta = 0.95
    """Decay of the second moment."""

    eps: Positive = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: NonNegative = 0.1
    """Weight decay of all parameters; without `decay_norms_and_biases`, of matrices only."""

    decay_norms_and_biases: bool = True
    """Also apply the weight decay to norms and biases, as torchtitan does; false: only to matrices."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed: parameter by parameter, in lists, or in one fused kernel."""

    state_dtype: Literal["bfloat16", "float32"] | None = None
    """Format of Adam's two moments, which are then updated in float32; none: that of the parameters."""

    stochastic_rounding: bool = False
    """Round bfloat16 weights and moments up or down at random, so that small updates count on average."""

    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is computed."""


class LrScheduler(Section):
    """The learning rate over time: a linear warm-up, a plateau, a decay."""

    warmup_steps: Amount = 200
    """Steps of the linear warm-up, at most the whole schedule."""

    total_steps: Count | None = None
    """Length of the schedule in steps; none: `training.steps`."""

    decay_ratio: Share | None = None
    """Share of the schedule that decays; none: the decay starts right after the warm-up, without a plateau."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: Share = 0.0
    """The learning rate at the end of the decay, as a fraction of the peak."""

    variant: Literal["torchtitan", "early_decay"] = "torchtitan"
    """Schedule of torchtitan, or that of old Quadriga runs: decay from D/(D+1) of the peak on, long warm-up cut off."""

    def phases(self, steps: int) -> Phases:
        """The phases of the schedule of a run of `steps` optimizer steps.

        The warm-up comes first, and takes at most the whole schedule. A decay that does not fit after it is shortened.
        `decay_ratio * total` is rounded like Python's `round`, halves to even.
        """
        total = self.total_steps or steps
        warmup = min(self.warmup_steps, total)
        wanted = total - warmup if self.decay_ratio is None else round(total * self.decay_ratio)
        decay = min(wanted, total - warmup)
        return Phases(total, warmup, total - warmup - decay, decay, wanted)


@dataclass(frozen=True)
class Phases:
    """Phases in optimizer steps: `total = warmup + plateau + decay`. `wanted_decay` is the decay that `decay_ratio`
    requests, which the warm-up can shorten."""

    total: int
    warmup: int
    plateau: int
    decay: int
    wanted_decay: int
