"""Conversion needs memory for tensors, not for models: a model ten times as large peaks where a small one does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quadriga.checkpoint.hf_export import WeightFile, write_weights
from quadriga.checkpoint.hf_folder import TensorInfo
from quadriga.config.model_spec import ModelSpec
from quadriga.models.registry import hf_config, tensor_names
from quadriga.units import MIB

SMALL, LARGE = 2, 24  # layers
ALLOWED = 24 * MIB  # noise of the allocator; the largest tensor has 2.75 MiB in float32


def spec_of(layers: int) -> ModelSpec:
    return ModelSpec("llama3", "", dim=512, n_layers=layers, n_heads=8, n_kv_heads=4, ffn_dim=1408, vocab_size=512)


def write_folder(spec: ModelSpec, folder: Path) -> int:
    """Weights of a model in bfloat16, written without ever holding them; their bytes in float32."""
    folder.mkdir()
    names = tensor_names(spec)
    entries = {names.hf_name(name): TensorInfo(shape, torch.bfloat16) for name, shape in names.shapes.items()}
    file = WeightFile("model.safetensors", entries)
    with (folder / file.name).open("wb") as stream:
        write_weights(stream, file, lambda name: torch.full(entries[name].shape, 0.5, dtype=torch.bfloat16))
    (folder / "config.json").write_text(json.dumps(hf_config(spec, bos_id=None, eos_id=None)))
    return 4 * sum(math.prod(shape) for shape in names.shapes.values())


def peak(root: Path, *arguments: object) -> int:
    """The most memory that a conversion in a process of its own had, in bytes, mapped files included."""
    command = [sys.executable, "-m", "quadriga.cli", "convert", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path, root):
    peaks, sizes = {}, {}
    for layers in (SMALL, LARGE):
        place = tmp_path / str(layers)
        place.mkdir()
        sizes[layers] = write_folder(spec_of(layers), place / "hf")
        peaks["from-hf", layers] = peak(root, "from-hf", place / "hf", place / "ours", "--dtype", "float32")
        peaks["to-hf", layers] = peak(root, "to-hf", place / "ours", place / "out")
    assert sizes[LARGE] - sizes[SMALL] > 10 * ALLOWED
    for direction in ("from-hf", "to-hf"):
        assert peaks[direction, LARGE] - peaks[direction, SMALL] < ALLOWED, peaks
