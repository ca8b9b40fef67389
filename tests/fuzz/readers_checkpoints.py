"""Checkpoints that somebody else wrote: `plan.json`, `.metadata` without it, and the files of tensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from fuzzing import Reader
from torchtitan_checkpoints import SPEC, unpack, zip64

from quadriga.checkpoint import titan
from quadriga.checkpoint.folder import CheckpointError, InvalidCheckpoint
from quadriga.checkpoint.load import load_tensors, read_titan
from quadriga.checkpoint.plain_values import value_in_archive, value_of
from quadriga.checkpoint.plan_format import PlanError, format_raw
from quadriga.checkpoint.tensors import save_tensors
from quadriga.errors import Problem, UserError
from quadriga.models.registry import tensor_names

SHAPES = {"model.a.weight": (6, 5), "model.b.weight": (7,), "model.c": ()}


def build(folder: Path) -> None:
    place = folder / "saved"
    place.mkdir()
    save_tensors(place, {name: torch.ones(shape) for name, shape in SHAPES.items()}, None)


def build_older(folder: Path) -> None:
    build(folder)
    (folder / "saved/plan.json").unlink()


def read_it(folder: Path) -> None:
    """A fault of a checkpoint is told as such; for the driver it counts as a refusal, which it is."""
    try:
        load_tensors(folder / "saved", {name: torch.zeros(shape) for name, shape in SHAPES.items()}, None)
    except CheckpointError as error:
        raise UserError(Problem(json.dumps(str(folder)), str(error))) from error


NAMES = tensor_names(SPEC)


def build_theirs(folder: Path) -> None:
    (unpack("one_rank", folder / "run") / "step-6/.metadata").unlink()


def read_theirs(folder: Path) -> None:
    """As a start does: what it says of its run, then its tensors."""
    step = folder / "run/step-3"
    try:
        if titan.inspect(step) is not None:
            tensors = {f"model.{name}": torch.zeros(shape) for name, shape in NAMES.shapes.items()}
            tensors |= {f"optimizer.{name}.exp_avg": torch.zeros(shape) for name, shape in NAMES.shapes.items()}
            read_titan(step, tensors, NAMES, None)
    except (CheckpointError, InvalidCheckpoint) as error:
        raise UserError(Problem(json.dumps(str(folder)), str(error))) from error


def build_value(folder: Path) -> None:
    """A state as torchtitan's data loader has it, and an archive of it whose directory gives places in 64 bits."""
    (folder / "value.pkl").write_bytes(pickle.dumps({"dataset_state": {"token_buffer": [5, 300], "name": b"x"}}, 2))
    (folder / "value.zip").write_bytes(zip64((folder / "value.pkl").read_bytes(), 0))


def read_value(folder: Path) -> None:
    try:
        for value in (
            value_of((folder / "value.pkl").read_bytes()),
            value_in_archive((folder / "value.zip").read_bytes()),
        ):
            assert len(format_raw(value)) < 1000
            json.dumps(value, default=str)  # whoever goes through it by recursion comes to its end
    except PlanError as error:
        raise UserError(Problem(json.dumps(str(folder)), str(error))) from error


PICKLES = [
    b"\x85" * 5000,
    b"]" * 5000,
    b"(" * 5000,
    b"h\x00" * 300,
    b"c_codecs\nencode\n",
    b"}",
    b"a" * 3000,
    b"\xff" * 8,
]
TOKENS = [b'"torch.float32"', b"[[0],[1],0,0,9]", b"\x8c\x05posix\x8c\x06system\x93", b"PK\x03\x04", b"PK\x05\x06"]
READERS = [
    Reader("checkpoint: plan.json", build, read_it, TOKENS, ("saved/plan.json",)),
    Reader("checkpoint: .metadata", build_older, read_it, TOKENS, ("saved/.metadata",)),
    Reader("checkpoint: torchtitan, .metadata", build_theirs, read_theirs, TOKENS, ("run/step-3/.metadata",)),
    Reader("checkpoint: torchtitan, values", build_theirs, read_theirs, TOKENS, ("run/step-3/*.distcp",)),
    Reader("checkpoint: torchtitan, a value", build_value, read_value, PICKLES, ("value.*",)),
    Reader("checkpoint: tensors", build, read_it, TOKENS, ("saved/*.distcp",)),
]
