"""[optimizer] and [lr_scheduler]: how weights are updated, and how fast."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Beta, Count, NonNegative, Positive, Section, Share


class Optimizer(Section):
    """The optimizer and its constants."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Adam (decay added to the gradient) or AdamW (decay applied to the weight)."""

    lr: Positive = 8e-4
    """Peak learning rate."""

    beta1: Beta = 0.9
    """Decay of the first moment."""

    beta2: Beta = 0.95
    """Decay of the second moment."""

    eps: Positive = 1e-8
    """Added to the root of the second moment."""

    weight_decay: NonNegative = 0.1
    """Weight decay, on all parameters; without `decay_norms_and_biases` on matrices only."""

    decay_norms_and_biases: bool = True
    """Apply the weight decay to norms and biases too, as torchtitan does; false: to matrices only."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed: parameter by parameter, in lists, or in one fused kernel."""

    state_dtype: Literal["bfloat16", "float32"] | None = None
    """Format of Adam's two moments, whose updates are then computed in float32; none: that of the parameters."""

    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there."""


class LrScheduler(Section):
    """The learning rate over time: a linear ramp, a plateau, a decay."""

    warmup_steps: Amount = 200
    """Steps of the linear ramp at the start; shortened where the schedule is shorter."""

    total_steps: Count | None = None
    """Length of the schedule where it is not `training.steps`."""

    decay_ratio: Share | None = None
    """Share of the schedule spent decaying; none: decay starts right after the warm-up, with no plateau."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: Share = 0.0
    """Where the decay ends, as a fraction of the peak learning rate."""

    variant: Literal["torchtitan", "early_decay"] = "torchtitan"
    """Schedule of torchtitan, or that of Quadriga before it: decay from D/(D+1) of the peak on, warm-up cut off."""
