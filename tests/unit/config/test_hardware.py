"""The device table: drivers' names lead to the right row, and nothing else leads to any."""

from __future__ import annotations

import pytest

from quadriga.hardware import DEVICES, find_device


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("h100", "H100"),
        ("h100-80gb", "H100"),
        ("h100-96gb", "H100 96GB"),
        ("a100-40gb", "A100 40GB"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("cpu", "CPU"),
    ],
)
def test_a_drivers_name_finds_its_device(driver, name):
    assert find_device(driver).name == name


@pytest.mark.parametrize(
    "name", ["", "NVIDIA GeForce RTX 409", "H100 200GB", "NVIDIA A10", "NVIDIA L40", "NVIDIA T400", "H1000"]
)
def test_an_unknown_device_is_unknown(name):
    assert find_device(name) is None


def test_every_row_finds_itself_and_is_sound():
    for device in DEVICES:
        assert find_device(device.name) is find_device(device.slug) is device
        if device.name == "CPU":
            continue
        assert 0 < device.link_bandwidth < device.memory_bandwidth
        rates = [rate for rate in (device.fp32, device.tf32, device.bf16, device.fp8) if rate is not None]
        assert rates == sorted(rates)  # narrower is never slower
        assert device.source


def test_the_peak_follows_the_number_format():
    h100 = find_device("H100")
    assert h100.peak_flops("float32") == h100.fp32
    assert h100.peak_flops("float32", "high") == h100.tf32
    assert h100.peak_flops("bfloat16") == h100.bf16
    t4 = find_device("T4")
    assert t4.peak_flops("bfloat16") is None
    assert t4.peak_flops("float32", "high") == t4.fp32
