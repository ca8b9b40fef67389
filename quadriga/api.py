"""The torch-free part of the Python API: read a configuration, resolve it, estimate it. `quadriga` exports all names.

`trainer` is the other part. Both use the code of the command line, so values, errors and results are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quadriga.comm.backend import BACKENDS
from quadriga.config import JobConfig, Run, read
from quadriga.config.keys import format_toml
from quadriga.config.load import load
from quadriga.errors import UserError
from quadriga.hardware import device_named
from quadriga.log import logger
from quadriga.models.registry import catalogue
from quadriga.planning import estimate as planning
from quadriga.planning.estimate import Estimate
from quadriga.train.__main__ import invalid_variables, read_run


@dataclass(frozen=True)
class Config:
    """A configuration that was read, but not checked against models, files and devices yet.

    Attributes:
        values: every key with its value, for example `config.values.training.steps`; frozen.
        arguments: the command line that reads the same configuration.
    """

    values: JobConfig
    arguments: tuple[str, ...]


def load_config(file: str | os.PathLike[str], overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read a TOML file, and set keys over those in it.

    Args:
        file: the path of the file. Relative paths in it count from the current directory.
        overrides: by key, its value (`{"training.steps": 20}`), or arguments as on the command line
            (`["--training.steps=20"]`). `None` turns an optional key off.

    Raises:
        UserError: with all keys that are unknown, or whose value has the wrong type or is out of range.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"--{key}={_as_argument(value)}" for key, value in overrides.items()]
    arguments = (f"--job.config_file={os.fspath(file)}", *overrides)
    loaded = load(arguments, os.environ)
    if loaded.problems:
        raise UserError(*loaded.problems)
    return Config(loaded.config, arguments)


def resolve(config: Config, *, ranks: int | None = None) -> Run:
    """Check the keys against each other, and compute what follows from them. Reads the file again.

    Args:
        config: the result of `load_config`.
        ranks: for an estimate, the number of ranks. The tokenizer, the data and the devices may then be missing, as in
            a dry run. None: the run is for `build`, on the ranks of this program: `WORLD_SIZE`, which torchrun sets,
            else one. It then inherits from its newest checkpoint what a resumed run keeps.

    Returns:
        The run: `run.config` are the keys, `run.spec` is what follows from them (degrees, batch sizes, steps, folders),
        and `run.origin` has the source of each key.

    Raises:
        UserError: with all problems that were found.
    """
    if ranks is not None:
        return read(
            config.arguments,
            os.environ,
            catalogue=catalogue(),
            backends=BACKENDS,
            world_size=ranks,
            training=False,
        )
    if problems := invalid_variables(os.environ):
        raise UserError(*problems)
    with logger_as_it_was():
        return read_run(config.arguments, os.environ)


def estimate(run: Run, device: str | None = None, *, gpus_per_node: int = 8) -> Estimate:
    """Predict memory, communication and step time of a run. Needs no GPU, and does not import torch.

    Args:
        run: the result of `resolve`.
        device: a name of the device table (`"h100-80gb"`, `"cpu"`) or a TOML file with the figures of a device. None:
            that of the key `estimate.device`; without one, no time is predicted, and no statement about the fit.
        gpus_per_node: devices that share the fast link.

    Returns:
        The estimate: `worst.peak.total` and `worst.reserved` are bytes per rank, `memory_fit()` compares them with the
        device, `time.total` is in seconds per step, and `to_dict()` is the JSON of `quadriga estimate --json`.

    Raises:
        UserError: the device is not known, or its file has mistakes.
    """
    name = device or run.config.estimate.device
    return planning.estimate(run, device_named(name, "device") if name else None, gpus_per_node=gpus_per_node)


@contextmanager
def logger_as_it_was() -> Iterator[None]:
    """Afterwards, restore handlers, propagation and level of Quadriga's logger."""
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def _as_argument(value: Any) -> str:
    """A value as text of the command line, which has no quotes around text."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else format_toml(value)
