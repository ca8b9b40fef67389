"""Runs torchtitan v0.2.2 on one rank of a CPU, and records every step in full precision.

It runs in an environment with the package, which `fidelity.py` creates, not in Quadriga's:

    python torchtitan_on_cpu.py train RECORD.jsonl --job.config_file FILE ...     # then torchtitan's arguments
    python torchtitan_on_cpu.py defaults                                          # its JobConfig as TOML
    python torchtitan_on_cpu.py versions                                          # installed versions as JSON

No file of the package is changed. torchtitan uses PyTorch's accelerator as its device, and a CPU is not an accelerator
in PyTorch. So this script replaces the device module with one for the CPU. It also disables one call that no CPU
backend supports: a barrier with a device, for timeouts that one rank does not need.

The records are JSON lines: `parameter` (name, shape, mean and standard deviation, as drawn), `step` (loss, torchtitan's
gradient norm before clipping, the norm of the same gradients summed in float64, the learning rate of the step) and
`validation` (step, loss).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

REPORTED_PACKAGES = ("torchtitan", "torch", "datasets", "tokenizers", "safetensors")
MEMORY_BYTES = 1 << 34  # reported memory, for percentages that are not used


class CpuDevice:
    """The functions of `torch.cuda` that torchtitan calls, from `torch.cpu` if it has them."""

    def __init__(self, cpu: Any) -> None:
        self._cpu = cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def get_device_name(self, device: object = None) -> str:
        return "cpu"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(name="cpu", total_memory=MEMORY_BYTES)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: object = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def use_cpu_device() -> None:
    """Make the CPU torchtitan's device. Call it before any other import of torchtitan."""
    import torch

    device = CpuDevice(torch.cpu)
    with (
        patch("torch._utils._get_available_device_type", lambda: "cpu"),
        patch("torch._utils._get_device_module", lambda kind: device),
    ):
        import torchtitan.tools.utils
    import torchtitan.distributed.utils

    assert torchtitan.tools.utils.device_type == "cpu"
    torchtitan.distributed.utils.set_pg_timeouts = lambda *_, **__: None


def train(record: Path, arguments: list[str]) -> None:
    """Train as `python -m torchtitan.train ARGUMENTS` does."""
    if os.environ.get("WORLD_SIZE") != "1":
        raise SystemExit("only one rank is supported: set WORLD_SIZE=1")
    sys.argv = ["torchtitan.train", *arguments]  # read when its modules are imported
    use_cpu_device()
    import torchtitan.train

    clip = torchtitan.distributed.utils.clip_grad_norm_
    exact = [math.nan]  # of the current step

    def clip_and_measure(parameters: list[Any], *given: Any, **named: Any) -> Any:
        gradients = [parameter.grad.double() for parameter in parameters if parameter.grad is not None]
        exact[0] = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return clip(parameters, *given, **named)

    torchtitan.distributed.utils.clip_grad_norm_ = clip_and_measure

    class RecordingTrainer(torchtitan.train.Trainer):
        def __init__(self, job_config: Any) -> None:
            super().__init__(job_config)
            for part in self.model_parts:
                for name, parameter in part.named_parameters():
                    write({"kind": "parameter", **describe(name, parameter)})
            processor = self.metrics_processor
            log, log_validation = processor.log, processor.log_validation

            def log_step(step: int, loss: float, most: float, norm: float, extra_metrics: Mapping[str, Any]) -> None:
                norms = {"grad_norm": norm, "exact_grad_norm": exact[0]}
                write({"kind": "step", "step": step, "loss": loss, **norms, "lr": extra_metrics["lr"]})
                log(step, loss, most, norm, extra_metrics)

            def log_validation_loss(loss: float, step: int, extra_metrics: Mapping[str, Any] | None = None) -> None:
                write({"kind": "validation", "step": step, "loss": loss})
                log_validation(loss, step, extra_metrics)

            processor.log, processor.log_validation = log_step, log_validation_loss

    with record.open("w", encoding="utf-8") as file:

        def write(fields: Mapping[str, Any]) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        torchtitan.train.main(RecordingTrainer)


def describe(name: str, parameter: Any) -> dict[str, Any]:
    values = parameter.detach().double()
    plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    deviation = float(values.std(correction=0))
    return {"name": plain, "shape": list(values.shape), "mean": float(values.mean()), "std": deviation}


def defaults() -> str:
    """Every key of JobConfig with its default as TOML, without keys whose default is None."""
    use_cpu_device()
    from torchtitan.config import JobConfig

    tables = []
    for name, table in sections(dataclasses.asdict(JobConfig())):
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
        if lines:
            tables.append("\n".join([f"[{name}]", *lines, ""]))
    return "\n".join(tables)


def sections(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, table in tree.items():
        if isinstance(table, dict):
            yield f"{above}{name}", {key: value for key, value in table.items() if not isinstance(value, dict)}
            yield from sections(table, f"{above}{name}.")


def main() -> None:
    match sys.argv[1:]:
        case ["train", record, *arguments]:
            train(Path(record), arguments)
        case ["defaults"]:
            print(defaults())
        case ["versions"]:
            print(json.dumps({name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
