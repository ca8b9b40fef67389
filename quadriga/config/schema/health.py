"""[health]: what to do about NaN, infinities and loss spikes."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Count, Positive, Section

Policy = Literal["raise", "skip_step", "ignore"]


class Health(Section):
    """Checks of the loss and the gradients of every step, without waiting for the device."""

    non_finite: Policy = "raise"
    """After a NaN or infinite loss or gradient norm: stop before the optimizer step, skip the step, or ignore it."""

    spike: Policy = "ignore"
    """After a loss far above those of the previous steps: as `non_finite`."""

    spike_sigmas: Positive = 6.0
    """A loss is a spike if it is this many standard deviations above the mean of the last `spike_window` losses."""

    spike_window: Count = 128
    """The number of losses that a spike is compared with. The first losses of a run are never spikes."""

    replica_check_interval: Amount = 0
    """Steps between two comparisons of the replicas' weights, which must be equal bit for bit; 0 switches this off."""
