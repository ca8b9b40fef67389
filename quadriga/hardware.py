"""What devices can do, from their makers' data sheets. An unknown device is unknown: nothing is guessed for it.

Peak rates are dense (no 2:4 sparsity). Memory is the nominal size in decimal gigabytes; a driver reports a few per cent
more or less. Links are per direction and per device, to its neighbours in one machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator. Rates in FLOP/s, None where it has no such unit; memory in bytes; bandwidths in bytes/s."""

    name: str
    words: tuple[str, ...]  # all of these occur, as words, in the name that a driver reports
    fp32: float
    tf32: float | None
    bf16: float | None
    fp8: float | None
    memory: float
    memory_bandwidth: float
    link: str
    link_bandwidth: float
    source: str

    def peak_flops(self, dtype: str, matmul_precision: str = "highest") -> float | None:
        """Peak rate in FLOP/s of matrix products in `dtype` (`float32`, `bfloat16`, `float8`).

        `matmul_precision` is that of `torch.set_float32_matmul_precision`: `high` lets float32 run as TF32, `medium`
        as bfloat16. None where the device has no such unit.
        """
        if dtype == "float32":
            narrow = {"highest": self.fp32, "high": self.tf32, "medium": self.bf16}[matmul_precision]
            return narrow or self.fp32
        return {"bfloat16": self.bf16, "float8": self.fp8}[dtype]


# The more words a device needs, the earlier it stands.
DEVICES = (
    Device(
        "A100 40GB", ("a100", "40gb"), 19.5 * TERA, 156 * TERA, 312 * TERA, None,
        40 * GIGA, 1555 * GIGA, "NVLink 3", 300 * GIGA, "NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Device(
        "A100", ("a100",), 19.5 * TERA, 156 * TERA, 312 * TERA, None,
        80 * GIGA, 2039 * GIGA, "NVLink 3", 300 * GIGA, "NVIDIA A100 80GB Tensor Core GPU data sheet (SXM)",
    ),
    Device(
        "H100 PCIe", ("h100", "pcie"), 51 * TERA, 378 * TERA, 756 * TERA, 1513 * TERA,
        80 * GIGA, 2000 * GIGA, "PCIe 5", 64 * GIGA, "NVIDIA H100 Tensor Core GPU data sheet (PCIe)",
    ),
    Device(
        "H100 NVL", ("h100", "nvl"), 60 * TERA, 417.5 * TERA, 835.5 * TERA, 1671 * TERA,
        94 * GIGA, 3900 * GIGA, "NVLink 4 bridge", 300 * GIGA, "NVIDIA H100 Tensor Core GPU data sheet (NVL)",
    ),
    Device(
        "H100", ("h100",), 67 * TERA, 494.7 * TERA, 989.4 * TERA, 1978.9 * TERA,
        80 * GIGA, 3350 * GIGA, "NVLink 4", 450 * GIGA, "NVIDIA H100 Tensor Core GPU data sheet (SXM)",
    ),
    Device(
        "H200", ("h200",), 67 * TERA, 494.7 * TERA, 989.4 * TERA, 1978.9 * TERA,
        141 * GIGA, 4800 * GIGA, "NVLink 4", 450 * GIGA, "NVIDIA H200 Tensor Core GPU data sheet (SXM)",
    ),
    Device(
        "H20", ("h20",), 44 * TERA, 74 * TERA, 148 * TERA, 296 * TERA,
        96 * GIGA, 4000 * GIGA, "NVLink 4", 450 * GIGA, "NVIDIA H20 data sheet",
    ),
    Device(
        "B200", ("b200",), 75 * TERA, 1125 * TERA, 2250 * TERA, 4500 * TERA,
        180 * GIGA, 7700 * GIGA, "NVLink 5", 900 * GIGA, "NVIDIA HGX B200 data sheet, per GPU",
    ),
    Device(
        "GB200", ("gb200",), 80 * TERA, 1250 * TERA, 2500 * TERA, 5000 * TERA,
        186 * GIGA, 8000 * GIGA, "NVLink 5", 900 * GIGA, "NVIDIA GB200 NVL72 data sheet, per GPU",
    ),
    Device(
        "MI300X", ("mi300x",), 163.4 * TERA, 653.7 * TERA, 1307.4 * TERA, 2614.9 * TERA,
        192 * GIGA, 5300 * GIGA, "Infinity Fabric", 448 * GIGA, "AMD Instinct MI300X data sheet",
    ),
    Device(
        "L40S", ("l40s",), 91.6 * TERA, 183 * TERA, 362.05 * TERA, 733 * TERA,
        48 * GIGA, 864 * GIGA, "PCIe 4", 32 * GIGA, "NVIDIA L40S data sheet",
    ),
    Device(
        "A10G", ("a10g",), 35 * TERA, 35 * TERA, 70 * TERA, None,
        24 * GIGA, 600 * GIGA, "PCIe 4", 32 * GIGA, "NVIDIA A10G data sheet",
    ),
    Device(
        "T4", ("t4",), 8.1 * TERA, None, None, None,
        16 * GIGA, 300 * GIGA, "PCIe 3", 16 * GIGA, "NVIDIA T4 Tensor Core GPU data sheet",
    ),
)  # fmt: skip


def find_device(name: str) -> Device | None:
    """The device that a driver (`NVIDIA H100 80GB HBM3`) or a user (`h100`) names; None if it is not in the table."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return next((device for device in DEVICES if words.issuperset(device.words)), None)
