"""Small Llamas for the tests of Hugging Face import and export: as ours, as checkpoints, and as folders of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.hf_export import WeightFile, write_weights
from quadriga.checkpoint.hf_folder import TensorInfo
from quadriga.checkpoint.tensors import save_tensors
from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.models.llama.model import Llama
from quadriga.models.registry import hf_config, parallel_plan, tensor_names
from quadriga.parallel.materialize import materialize

# Of the four frequencies of a head here one is kept, one blended, two are slowed down, within reach of a test.
SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=340)
SPEC = ModelSpec(name="llama3", flavor="tiny", dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=56, vocab_size=99)


def random_model(spec: ModelSpec, seed: int = 1) -> Llama:
    """Far from the initial values, where an error would hardly show; the same on every call."""
    with torch.device("meta"):
        model = Llama(spec)
    materialize(model, parallel_plan(spec).parameters, seed, torch.device("cpu"))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.mul_(1.5).add_(noise * 0.1)
    return model


def save(model: Llama, folder: Path, step: int = 7, config: Mapping[str, Any] | None = None) -> CheckpointInfo:
    """A published checkpoint of the model alone."""
    place = folders.prepare(folder, step)
    hashes = save_tensors(place, {f"model.{name}": value for name, value in model.state_dict().items()}, None)
    extra = {"model": asdict(model.spec)} | ({} if config is None else {"config": dict(config)})
    return folders.read_checkpoint(folders.publish(folder, step, ("model",), extra, place, hashes))


def write_hf(model: Llama, folder: Path) -> Path:
    """The model as a folder of Hugging Face's, one file, without their library."""
    folder.mkdir(parents=True)
    names = tensor_names(model.spec)
    tensors = {names.hf_name(name): value for name, value in model.state_dict().items()}
    entries = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with (folder / "model.safetensors").open("wb") as stream:
        write_weights(stream, WeightFile("model.safetensors", entries), tensors.__getitem__)
    (folder / "config.json").write_text(json.dumps(hf_config(model.spec, bos_id=None, eos_id=None)))
    return folder


def logits(model: torch.nn.Module, spec: ModelSpec, seq: int = 300) -> torch.Tensor:
    tokens = torch.randint(spec.vocab_size, (2, seq), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits
