"""Rates, memory and bandwidths of devices, from the data sheets of their makers. Nothing is guessed for others.

- Peak rates are dense, without 2:4 sparsity.
- Memory is the nominal size in decimal gigabytes. `capacity` is what a program can allocate.
- Link bandwidth is per direction and per device, within one machine.
- Network bandwidth is the share of one device, to other machines, in the maker's reference design.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.limits import DEVICE_FIGURES
from quadriga.reading import read_toml

TERA, GIGA, GIB = 1e12, 1e9, 1024**3
# Shares of the nominal size, read as GiB. torch reports 39.4 for an "A100 40GB", 79.2 for an "H100 80GB", 95.0 for an
# "H100 96GB", 139.8 for an "H200 141GB". Error correction in the same memory takes more.
CAPACITY_SHARE, ECC_CAPACITY_SHARE = 0.985, 0.925
NETWORK = 50 * GIGA  # 400 Gbit/s per device


@dataclass(frozen=True)
class Device:
    """One accelerator. Rates are in FLOP/s, memory in bytes, bandwidths in bytes/s.

    A rate is None if the device has no such unit. The rates and memory of a processor (`CPU`) are None: they vary.
    """

    name: str
    keywords: tuple[str, ...]  # all of these occur, as words, in the name that a driver reports
    fp32: float | None
    tf32: float | None
    bf16: float | None
    fp8: float | None
    memory: float | None
    memory_bandwidth: float | None
    link: str
    link_bandwidth: float | None
    source: str
    network_bandwidth: float = NETWORK
    capacity_share: float = CAPACITY_SHARE

    @property
    def slug(self) -> str:
        """Its name in commands and files: `h100-80gb`."""
        name = self.name.lower().replace(" ", "-")
        return name if self.memory is None or name.endswith("gb") else f"{name}-{self.memory / GIGA:.0f}gb"

    @property
    def capacity(self) -> float | None:
        """Bytes that a program can allocate; None if the size is not known."""
        return None if self.memory is None else self.capacity_share * self.memory / GIGA * GIB

    def peak_flops(self, dtype: str, matmul_precision: str = "highest") -> float | None:
        """Peak rate in FLOP/s of matrix products in `dtype` (`float32`, `bfloat16`, `float8`).

        `matmul_precision` is that of `torch.set_float32_matmul_precision`: with `high`, float32 runs as TF32; with
        `medium`, as bfloat16. None if the device has no such unit.
        """
        if dtype == "float32":
            narrow = {"highest": self.fp32, "high": self.tf32, "medium": self.bf16}[matmul_precision]
            return narrow or self.fp32
        return {"bfloat16": self.bf16, "float8": self.fp8}[dtype]


# `find_device` takes the first match, so devices with more keywords come first.
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
        "H100 96GB", ("h100", "96gb"), 67 * TERA, 494.7 * TERA, 989.4 * TERA, 1978.9 * TERA,
        96 * GIGA, 2400 * GIGA, "NVLink 4", 450 * GIGA, "torchtitan's figures for its H100 with HBM2e",
    ),
    Device(
        "H100", ("h100",), 67 * TERA, 494.7 * TERA, 989.4 * TERA, 1978.9 * TERA,
        80 * GIGA, 3350 * GIGA, "NVLink 4", 450 * GIGA, "NVIDIA H100 Tensor Core GPU data sheet (SXM)",
    ),
    Device(
        "GH200", ("gh200",), 67 * TERA, 494.7 * TERA, 989.4 * TERA, 1978.9 * TERA,
        96 * GIGA, 4000 * GIGA, "NVLink 4", 450 * GIGA, "NVIDIA GH200 Grace Hopper data sheet (96 GB HBM3)",
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
        48 * GIGA, 864 * GIGA, "PCIe 4", 32 * GIGA, "NVIDIA L40S data sheet", 25 * GIGA, ECC_CAPACITY_SHARE,
    ),
    Device(
        "RTX 4090", ("rtx", "4090"), 82.6 * TERA, 82.6 * TERA, 165.2 * TERA, 330.3 * TERA,
        24 * GIGA, 1008 * GIGA, "PCIe 4", 32 * GIGA, "NVIDIA Ada GPU architecture white paper", 12.5 * GIGA,
    ),
    Device(
        "A10G", ("a10g",), 35 * TERA, 35 * TERA, 70 * TERA, None,
        24 * GIGA, 600 * GIGA, "PCIe 4", 32 * GIGA, "NVIDIA A10G data sheet",
    ),
    Device(
        "T4", ("t4",), 8.1 * TERA, None, None, None,
        16 * GIGA, 300 * GIGA, "PCIe 3", 16 * GIGA, "NVIDIA T4 Tensor Core GPU data sheet",
    ),
    Device("CPU", ("cpu",), None, None, None, None, None, None, "shared memory", None, "measured, never looked up"),
)  # fmt: skip


def find_device(name: str) -> Device | None:
    """The device that a driver (`NVIDIA H100 80GB HBM3`) or a user (`h100`, `h100-80gb`) names, or None.

    A size in the name must be that of the device. Grace Hopper is the exception: its name has the size of another
    memory.
    """
    keywords = set(re.findall(r"[a-z0-9]+", name.lower()))
    sizes = {word for word in keywords if re.fullmatch(r"\d+gb", word)}
    for device in DEVICES:
        if keywords.issuperset(device.keywords):
            own = f"{(device.memory or 0) / GIGA:.0f}gb"
            return device if not sizes or own in sizes or device.name == "GH200" else None
    return None


def device_named(name: str, key: str) -> Device:
    """The device of the table, or of a TOML file with the fields of `Device`. Raises UserError if there is none."""
    if name.endswith(".toml"):
        return _device_from_file(name, key)
    device = find_device(name)
    if device is None:
        known = [device.slug for device in DEVICES]
        fix = "choose one of these, or name a TOML file with its figures (docs/estimates.md)"
        what = "the device is not in the table"
        raise UserError(Problem(key, what, name, allowed=", ".join(known), nearest=nearest(name, known), fix=fix))
    return device


def _device_from_file(path: str, key: str) -> Device:
    """Reads `name`, `memory` in GB, `memory_bandwidth`, `link_bandwidth`, `network_bandwidth` in GB/s, and rates in
    TFLOP/s."""
    try:
        raw = read_toml(path, what="device file")
    except UserError as error:
        raise UserError(*(replace(each, source=key) for each in error.problems)) from None
    where = shortened(path)
    texts = ("name", "link", "source")
    scales = {"memory": GIGA, "memory_bandwidth": GIGA, "link_bandwidth": GIGA, "network_bandwidth": GIGA}
    scales |= dict.fromkeys(("fp32", "tf32", "bf16", "fp8"), TERA)
    allowed = f"{DEVICE_FIGURES[0]:g} to {DEVICE_FIGURES[1]:g}"
    known = [*texts, *scales]
    problems = [
        Problem(
            f"{where}: {shortened(name)}",
            "a device file has no such key",
            allowed=", ".join(known),
            nearest=nearest(name, known),
        )
        for name in raw
        if name not in known
    ]
    problems += [
        Problem(f"{where}: {shortened(name)}", "is missing") for name in ("name", "memory", "fp32") if name not in raw
    ]
    problems += [
        Problem(f"{where}: {name}", "must be a number within the bounds", shortened(raw[name]), allowed=allowed)
        for name in scales
        if name in raw and not _is_figure(raw[name])
    ]
    problems += [
        Problem(f"{where}: {name}", "must be text", shortened(raw[name]))
        for name in texts
        if name in raw and not (isinstance(raw[name], str) and raw[name].isprintable())
    ]
    if problems:
        raise UserError(*problems)
    figures: dict[str, Any] = dict.fromkeys((each.name for each in fields(Device)[2:10]), None)
    figures |= {"link": "its link", "source": path, "keywords": ("a device of the user's",)}
    figures |= {name: value if name in texts else value * scales[name] for name, value in raw.items()}
    return Device(**figures)


def _is_figure(value: Any) -> bool:
    low, high = DEVICE_FIGURES
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # excludes NaN
