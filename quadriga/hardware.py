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


# Units of the figures in the table below and in device files: TFLOP/s, GB, GB/s.
SCALES = dict.fromkeys(("fp32", "tf32", "bf16", "fp8"), TERA)
SCALES |= dict.fromkeys(("memory", "memory_bandwidth", "link_bandwidth", "network_bandwidth"), GIGA)


def _device(
    name: str, keywords: str, link: str, source: str, *figures: float | None, capacity_share: float = CAPACITY_SHARE
) -> Device:
    """`figures`: in the order of `SCALES`; without the last one, the network has its default bandwidth."""
    scaled: dict[str, Any] = {key: each and each * SCALES[key] for key, each in zip(SCALES, figures, strict=False)}
    return Device(name, tuple(keywords.split()), link=link, source=source, capacity_share=capacity_share, **scaled)


# `find_device` takes the first match, so devices with more keywords come first.
DEVICES = (
    _device("A100 40GB", "a100 40gb", "NVLink 3", "NVIDIA A100 Tensor Core GPU data sheet",
            19.5, 156, 312, None, 40, 1555, 300),
    _device("A100", "a100", "NVLink 3", "NVIDIA A100 80GB Tensor Core GPU data sheet (SXM)",
            19.5, 156, 312, None, 80, 2039, 300),
    _device("H100 PCIe", "h100 pcie", "PCIe 5", "NVIDIA H100 Tensor Core GPU data sheet (PCIe)",
            51, 378, 756, 1513, 80, 2000, 64),
    _device("H100 NVL", "h100 nvl", "NVLink 4 bridge", "NVIDIA H100 Tensor Core GPU data sheet (NVL)",
            60, 417.5, 835.5, 1671, 94, 3900, 300),
    _device("H100 96GB", "h100 96gb", "NVLink 4", "torchtitan's figures for its H100 with HBM2e",
            67, 494.7, 989.4, 1978.9, 96, 2400, 450),
    _device("H100", "h100", "NVLink 4", "NVIDIA H100 Tensor Core GPU data sheet (SXM)",
            67, 494.7, 989.4, 1978.9, 80, 3350, 450),
    _device("GH200", "gh200", "NVLink 4", "NVIDIA GH200 Grace Hopper data sheet (96 GB HBM3)",
            67, 494.7, 989.4, 1978.9, 96, 4000, 450),
    _device("H200", "h200", "NVLink 4", "NVIDIA H200 Tensor Core GPU data sheet (SXM)",
            67, 494.7, 989.4, 1978.9, 141, 4800, 450),
    _device("H20", "h20", "NVLink 4", "NVIDIA H20 data sheet",
            44, 74, 148, 296, 96, 4000, 450),
    _device("B200", "b200", "NVLink 5", "NVIDIA HGX B200 data sheet, per GPU",
            75, 1125, 2250, 4500, 180, 7700, 900),
    _device("GB200", "gb200", "NVLink 5", "NVIDIA GB200 NVL72 data sheet, per GPU",
            80, 1250, 2500, 5000, 186, 8000, 900),
    _device("MI300X", "mi300x", "Infinity Fabric", "AMD Instinct MI300X data sheet",
            163.4, 653.7, 1307.4, 2614.9, 192, 5300, 448),
    _device("L40S", "l40s", "PCIe 4", "NVIDIA L40S data sheet",
            91.6, 183, 362.05, 733, 48, 864, 32, 25, capacity_share=ECC_CAPACITY_SHARE),
    _device("RTX 4090", "rtx 4090", "PCIe 4", "NVIDIA Ada GPU architecture white paper",
            82.6, 82.6, 165.2, 330.3, 24, 1008, 32, 12.5),
    _device("A10G", "a10g", "PCIe 4", "NVIDIA A10G data sheet",
            35, 35, 70, None, 24, 600, 32),
    _device("T4", "t4", "PCIe 3", "NVIDIA T4 Tensor Core GPU data sheet",
            8.1, None, None, None, 16, 300, 16),
    _device("CPU", "cpu", "shared memory", "measured, never looked up", None, None, None, None, None, None, None),
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
    allowed = f"{DEVICE_FIGURES[0]:g} to {DEVICE_FIGURES[1]:g}"
    known = [*texts, *SCALES]
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
        for name in SCALES
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
    figures |= {name: value if name in texts else value * SCALES[name] for name, value in raw.items()}
    return Device(**figures)


def _is_figure(value: Any) -> bool:
    low, high = DEVICE_FIGURES
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # excludes NaN
