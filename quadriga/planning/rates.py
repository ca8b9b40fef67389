"""Speeds of a machine: assumed from a device's data sheet and published runs, or measured in a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from quadriga.hardware import GIGA, TERA, Device

# Fitted to published runs: `python benchmarks/estimates.py`, and docs/estimates.md for what each stands for. By device:
# the share of the dense peak that large matrix products sustain at its power limit. `float8_rowwise`: speed of float8
# products relative to bfloat16. `async_tp`: share of the time of tensor-parallel collectives that async TP exposes.
# `imbalance`: extra attention with context parallelism, times 1 - 1 / cp; 1 is an unbalanced causal mask. `attention`:
# the most TFLOP/s of flash attention 2, which has 35 % of an H100's peak forward (arXiv:2407.08608). `eager`: accesses
# of elementwise operations, relative to one read per input and one write. `overlap`: memory accesses per byte of the
# collectives of `fully_shard`, its copies included.
FITTED = {
    "A100": 0.90,
    "H100 96GB": 0.73,  # at 500 W
    "H200": 0.78,
    "float8": 2.0,  # not fitted: the ratio of the peaks
    "float8_rowwise": 1.42,
    "async_tp": 0.8,  # not fitted: the gain of the one pair of rows on the fit side
    "imbalance": 0.08,
    "attention": 225.0,
    "eager": 2.55,
    "overlap": 8.6,
}
SAME_LIMIT = {"A100 40GB": "A100", "H100": "H200", "GH200": "H200"}  # the same chip at about the same power limit
PRODUCTS = 0.7  # assumed: the share of devices without published runs
ATTENTION = 0.6  # of the peak, at most: flash attention 2 on A100 (arXiv:2307.08691)
MEMORY, LINK = 0.8, 0.75  # assumed shares of the bandwidths
CALL_SECONDS, NETWORK_CALL_SECONDS = 10e-6, 25e-6  # latency of a collective; each further rank adds a tenth of it
OPERATION_SECONDS = 8e-6  # host time to launch one operation
PCIE_5, PCIE_4 = 64 * GIGA, 32 * GIGA  # bytes/s per direction, 16 links
HOST_MEMORY = 400 * GIGA  # bytes/s of a machine: about 80 % of two sockets with eight channels of DDR5-4000


@dataclass(frozen=True)
class Rates:
    """`products`, `attention`: FLOP/s. `memory`: bytes/s. `link`, `network`: bytes/s within a machine and between
    machines, per device and direction. `operation`: host seconds per operation. `step`: other seconds per step.

    `forward_products`, `forward_attention`: FLOP/s of the forward pass; None: the same as in the backward pass.
    `update`: bytes/s of the optimizer; None: `memory`. `measured`: the source of measured rates; None: assumed.
    `pcie`: bytes/s between device and host, `host_memory`: bytes/s of a machine; for state in host memory.
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
    pcie: float = LINK * PCIE_5
    host_memory: float = HOST_MEMORY

    @classmethod
    def assumed(cls, device: Device, dtype: str, matmul_precision: str) -> Rates | None:
        """Rates assumed from the data sheet; None if it lacks a figure, or the device has no units for the dtype."""
        peak = device.peak_flops(dtype, matmul_precision)
        if peak is None or device.memory_bandwidth is None or device.link_bandwidth is None:
            return None
        pcie = PCIE_5 if device.fp8 else PCIE_4
        return cls(
            products=_sustained(device) * peak,
            attention=min(ATTENTION * peak, FITTED["attention"] * TERA),
            memory=MEMORY * device.memory_bandwidth,
            link=LINK * device.link_bandwidth,
            network=LINK * device.network_bandwidth,
            pcie=LINK * (device.link_bandwidth if device.link.startswith("PCIe") else pcie),
        )

    @property
    def descriptions(self) -> tuple[str, ...]:
        """The assumptions, or the source of measured rates, as text."""
        if self.measured:
            return (f"rates measured in {self.measured}",)
        return (
            "uncalibrated: no run was measured (--calibrate RUN_FOLDER)",
            "rates of products, attention and float8 are fitted to published runs (docs/estimates.md)",
            f"memory at {MEMORY:.0%} and links at {LINK:.0%} of their bandwidth, a network of 400 Gbit/s per GPU",
            f"the host launches an operation in {1e6 * OPERATION_SECONDS:.0f} microseconds",
        )

    def to_dict(self) -> Mapping[str, float | str | None]:
        return asdict(self)


def _sustained(device: Device) -> float:
    """The share of the dense peak that large matrix products reach on `device`."""
    return FITTED.get(SAME_LIMIT.get(device.name, device.name), PRODUCTS)
