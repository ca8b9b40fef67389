"""[health]: what to do when the numbers go wrong."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Count, Positive, Section

Policy = Literal["raise", "skip_step", "ignore"]


class Health(Section):
    """Watches the loss and the gradients of every step, without making the host wait for the device."""

    non_finite: Policy = "raise"
    """A loss or gradient norm that is no finite number: leave the weights alone and stop, or go on; or let it pass."""

    spike: Policy = "ignore"
    """A loss far above those of the steps before: the same choice as for `non_finite`."""

    spike_sigmas: Positive = 6.0
    """How many standard deviations above the mean of the last `spike_window` losses a loss counts as a spike."""

    spike_window: Count = 128
    """Losses that a spike is measured against; the first ones of a run are never spikes."""

    replica_check_interval: Amount = 0
    """Steps between two comparisons of the replicas' weights, which must be equal to the bit; 0 never compares."""
