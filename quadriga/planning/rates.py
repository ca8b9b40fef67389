"""How fast a machine works: assumed from a device's data sheet, or measured in a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from quadriga.hardware import Device

# Shares of what the data sheets promise that long runs reach. They are guesses to rank layouts by, and said to be.
PRODUCTS, ATTENTION, MEMORY, LINK = 0.65, 0.45, 0.8, 0.75
CALL_SECONDS, NETWORK_CALL_SECONDS = 10e-6, 25e-6  # until a collective's first byte, and for each further rank a tenth
OPERATION_SECONDS = 8e-6  # of the host, to launch one operation


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products and of attention, bytes/s of memory, of the link in a machine and of the network
    between machines (of one device, in one direction), seconds of the host for an operation, and of a step for what
    is none of these.

    `forward_products`, `forward_attention`: of the forward pass, None: as of the backward pass.
    `update`: bytes/s of the optimizer, None: those of memory. `measured`: where they come from, None: assumed.
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
        """None for a device without figures, or without units for the dtype."""
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
        """What was assumed, or where it was measured."""
        if self.measured:
            return (f"rates measured in {self.measured}",)
        return (
            "uncalibrated: no run was measured (--calibrate RUN_FOLDER)",
            f"matrix products at {PRODUCTS:.0%} of the dense peak, attention at {ATTENTION:.0%}",
            f"memory at {MEMORY:.0%} and links at {LINK:.0%} of their bandwidth, 400 Gbit/s of network a GPU",
            f"the host launches an operation in {1e6 * OPERATION_SECONDS:.0f} microseconds",
        )

    def to_dict(self) -> Mapping[str, float | str | None]:
        return asdict(self)
