"""Checkpoints that somebody else wrote: `plan.json`, `.metadata` without it, and the files of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fuzzing import Reader
from theirs import SPEC, unpack

from quadriga.checkpoint import titan
from quadriga.checkpoint.folder import CheckpointError, NotWhole
from quadriga.checkpoint.tensors import read, write
from quadriga.checkpoint.titan_read import read_titan
from quadriga.errors import Problem, UserError
from quadriga.models.registry import titan_names

SHAPES = {"model.a.weight": (6, 5), "model.b.weight": (7,), "model.c": ()}


def build(folder: Path) -> None:
    place = folder / "saved"
    place.mkdir()
    write(place, {name: torch.ones(shape) for name, shape in SHAPES.items()}, None)


def build_older(folder: Path) -> None:
    build(folder)
    (folder / "saved/plan.json").unlink()


def read_it(folder: Path) -> None:
    """A fault of a checkpoint is told as such; for the driver it counts as a refusal, which it is."""
    try:
        read(folder / "saved", {name: torch.zeros(shape) for name, shape in SHAPES.items()}, None)
    except CheckpointError as error:
        raise UserError(Problem(json.dumps(str(folder)), str(error))) from error


NAMES = titan_names(SPEC)


def build_theirs(folder: Path) -> None:
    (unpack("one_rank", folder / "run") / "step-6/.metadata").unlink()


def read_theirs(folder: Path) -> None:
    """As a start does: what it says of its run, then its tensors."""
    step = folder / "run/step-3"
    try:
        if titan.look(step) is not None:
            tensors = {f"model.{name}": torch.zeros(shape) for name, shape in NAMES.shapes.items()}
            tensors |= {f"optimizer.{name}.exp_avg": torch.zeros(shape) for name, shape in NAMES.shapes.items()}
            read_titan(step, tensors, NAMES, None)
    except (CheckpointError, NotWhole) as error:
        raise UserError(Problem(json.dumps(str(folder)), str(error))) from error


TOKENS = [b'"torch.float32"', b"[[0],[1],0,0,9]", b"\x8c\x05posix\x8c\x06system\x93", b"PK\x03\x04", b"PK\x05\x06"]
READERS = [
    Reader("checkpoint: plan.json", build, read_it, TOKENS, ("saved/plan.json",)),
    Reader("checkpoint: .metadata", build_older, read_it, TOKENS, ("saved/.metadata",)),
    Reader("checkpoint: torchtitan, .metadata", build_theirs, read_theirs, TOKENS, ("run/step-3/.metadata",)),
    Reader("checkpoint: torchtitan, values", build_theirs, read_theirs, TOKENS, ("run/step-3/*.distcp",)),
    Reader("checkpoint: tensors", build, read_it, TOKENS, ("saved/*.distcp",)),
]
