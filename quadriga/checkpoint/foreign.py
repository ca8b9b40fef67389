"""Checkpoints of other programs: the names of tensors in them, and how folders `step-N` of another trainer are
distinguished from Quadriga's and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from quadriga.checkpoint.files import Files, Location, files_at
from quadriga.checkpoint.manifest import METADATA, STATE_FILE, TOKEN
from quadriga.checkpoint.plan_format import PLAN_FILE
from quadriga.errors import Problem

HF_INDEX = "model.safetensors.index.json"  # of a last save in Hugging Face's format
SHARDED = "sharded"  # the folder in such a save with the files of each rank
SHARDS = (".safetensors", ".distcp")


class TensorNames(Protocol):
    """Maps the tensors of one model to names in other programs; see `models.registry.tensor_names`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor of the whole model, by Quadriga's names."""

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of a tensor."""

    def is_optional(self, name: str) -> bool:
        """Whether Hugging Face's files can have this tensor although the model does not need it."""

    def config_differences(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        """The differences between the model of a `config.json` and this model."""

    def paired_rows(self, name: str) -> int:
        """Rows per head, if torchtitan rotates the rows of this tensor in pairs; otherwise 0."""


def has_foreign_plan(files: Files, path: Location) -> bool:
    """Whether a folder has DCP's plan, and no file that only Quadriga writes. The plan is not read."""
    names = set(files.names(path))
    return METADATA in names and not names & {STATE_FILE, PLAN_FILE}


def has_foreign_plan_on_disk(path: Location) -> bool:
    """`has_foreign_plan` for a path in a file system; False if the folder does not exist, or in an object store."""
    files = files_at(path)
    try:
        return files.renames and has_foreign_plan(files, path)
    except OSError:
        return False


def has_foreign_weights(files: Files, path: Location) -> bool:
    """Whether a folder (not a link to one) has weights, and no file that only Quadriga writes. A save that was
    interrupted counts too: its shards may have no plan, or be only in `sharded`."""
    if files.is_link(path):
        return False
    names = set(files.names(path))
    weights = names & {METADATA, HF_INDEX, SHARDED} or any(name.endswith(SHARDS) for name in names)
    return bool(weights) and not names & {STATE_FILE, PLAN_FILE}


def has_hugging_face_weights(files: Files, path: Location) -> bool:
    """Whether a folder has weights in Hugging Face's format, not only the files of each rank."""
    return any(name == HF_INDEX or name.endswith(".safetensors") for name in files.names(path))


def backup_path(files: Files, folder: str, step: int) -> str:
    """An unused name for another trainer's step N, if a save of Quadriga needs that name. No trainer reads it as a
    step."""
    name, number = f"{folder.rstrip('/')}/step_{step}.theirs", 1
    while files.exists(name):
        number += 1
        name = f"{folder.rstrip('/')}/step_{step}.theirs-{number}"
    return name


def remove_unless_foreign(files: Files, path: Location) -> None:
    if not has_foreign_weights(files, path):
        files.remove(path)


def remove_saves(files: Files, path: Location, keep: str = "") -> None:
    """On an object store: removes the files of Quadriga's saves of a step, except of the save `keep`. Files of another
    trainer with the same name are kept."""
    for name in files.names(path):
        if TOKEN.fullmatch(name) and name != keep:
            files.remove(f"{path}/{name}")


def remove_step(files: Files, path: Location) -> None:
    """On an object store: removes a checkpoint of Quadriga, its manifest first, so that it is never incomplete."""
    manifest = f"{path}/{STATE_FILE}"
    files.remove(manifest)
    if all(TOKEN.fullmatch(name) for name in files.names(path)):
        files.remove(path)  # one request, which also removes the folder if the store has folders
    else:
        remove_saves(files, path)
