"""Speeds of a machine: assumed from a device's data sheet, or measured in a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from quadriga.hardware import Device

# Assumed shares of the data sheets' peaks. They are guesses, good for ranking layouts, and reported as assumptions.
PRODUCTS, ATTENTION, MEMORY, LINK = 0.65, 0.45, 0.8, 0.75
CALL_SECONDS, NETWORK_CALL_SECONDS = 10e-6, 25e-6  # latency of a collective; each further rank adds a tenth of it
OPERATION_SECONDS = 8e-6  # host time to launch one operation


@dataclass(frozen=True)
class Rates:
    """`products`, `attention`: FLOP/s. `memory`: bytes/s. `link`, `network`: bytes/s within a machine and between
    machines, per device and direction. `operation`: host seconds per operation. `step`: other seconds per step.

    `forward_products`, `forward_attention`: FLOP/s of the forward pass; None: the same as in the backward pass.
    `update`: bytes/s of the optimizer; None: `memory`. `measured`: the source of measured rates; None: assumed.
    """

    products: float
    attention: float
    memory: float
    link: float
    network: float
    operation: float = OPERATION_SECONDS
    step: float = 0.0
    update: float | None = None
    measured: str | None = None
    forward_products: float | None = None
    forward_attention: float | None = None

    @classmethod
    def assumed(cls, device: Device, dtype: str, matmul_precision: str) -> Rates | None:
        """Rates assumed from the data sheet; None if it lacks a figure, or the device has no units for the dtype."""
        peak = device.peak_flops(dtype, matmul_precision)
        if peak is None or device.memory_bandwidth is None or device.link_bandwidth is None:
            return None
        return cls(
            products=PRODUCTS * peak,
            attention=ATTENTION * peak,
            memory=MEMORY * device.memory_bandwidth,
            link=LINK * device.link_bandwidth,
            network=LINK * device.network_bandwidth,
        )

    @property
    def descriptions(self) -> tuple[str, ...]:
        """The assumptions, or the source of measured rates, as text."""
        if self.measured:
            return (f"rates measured in {self.measured}",)
        return (
            "uncalibrated: no run was measured (--calibrate RUN_FOLDER)",
            f"matrix products at {PRODUCTS:.0%} of the dense peak, attention at {ATTENTION:.0%}",
            f"memory at {MEMORY:.0%} and links at {LINK:.0%} of their bandwidth, a network of 400 Gbit/s per GPU",
            f"the host launches an operation in {1e6 * OPERATION_SECONDS:.0f} microseconds",
        )

    def to_dict(self) -> Mapping[str, float | str | None]:
        return asdict(self)
