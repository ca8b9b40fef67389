"""What a start prints on a GPU that computes in float32, with the name of a GPU that this machine does not have."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.hardware import find_device
from quadriga.models.registry import catalogue
from quadriga.train.header import log_header
from quadriga.train.numerics import bfloat16_peak, peak_flops

FLOAT32 = "--training.mixed_precision_param=float32"


def run_of(*arguments: str) -> Run:
    argv = ["--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", *arguments]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """The name that the driver reports, to be set by the test."""
    name = SimpleNamespace(text="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name.text)
    return name


def costs(caplog: pytest.LogCaptureFixture, device: str, *arguments: str) -> list[str]:
    """The lines of a start that name what float32 costs."""
    run, logger = run_of(*arguments), logging.getLogger("quadriga")
    logger.setLevel(logging.INFO)
    caplog.clear()
    where = {"device": torch.device(device), "backend": "nccl" if device == "cuda" else "gloo"}
    log_header(SimpleNamespace(run=run, state=SimpleNamespace(step=0, attempt=1, loader=None), **where))
    return [line for line in caplog.messages if "precision `highest`:" in line]


def test_a_start_in_float32_prints_one_line_with_the_loss_and_the_key(gpu, caplog) -> None:
    (line,) = costs(caplog, "cuda", FLOAT32)
    assert line == (
        "notice: the run computes in float32 at precision `highest`: H100 multiplies matrices at 67 TFLOP/s, and in "
        "bfloat16 at 989.4 (15 times); `--training.mixed_precision_param bfloat16` uses this, and changes the numbers"
    )


def test_a_gpu_that_no_table_has_is_named_without_figures(gpu, caplog) -> None:
    gpu.text = "NVIDIA Something 9"
    (line,) = costs(caplog, "cuda", FLOAT32)
    assert "several times faster in bfloat16; `--training.mixed_precision_param bfloat16`" in line


def test_other_starts_print_no_such_line(gpu, caplog) -> None:
    assert costs(caplog, "cpu", FLOAT32) == []
    assert costs(caplog, "cuda", "--training.mixed_precision_param=bfloat16") == []
    assert costs(caplog, "cuda", FLOAT32, "--training.float32_matmul_precision=high") == []
    gpu.text = "Tesla T4"  # has no bfloat16
    assert costs(caplog, "cuda", FLOAT32) == []


def test_the_peak_in_bfloat16_is_that_of_the_table_for_a_run_in_float32(gpu) -> None:
    cuda, h100 = torch.device("cuda"), find_device("h100")
    full = run_of(FLOAT32).config.training
    assert (peak_flops(cuda, full), bfloat16_peak(cuda, full)) == (h100.fp32, h100.bf16)
    assert bfloat16_peak(cuda, run_of("--training.mixed_precision_param=bfloat16").config.training) is None
    assert bfloat16_peak(cuda, run_of(FLOAT32, "--training.float32_matmul_precision=high").config.training) is None
    assert bfloat16_peak(torch.device("cpu"), full) is None
    gpu.text = "NVIDIA Something 9"
    assert peak_flops(cuda, full) is bfloat16_peak(cuda, full) is None
