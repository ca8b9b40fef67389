"""Folders called `step-N` that another trainer wrote: how they are told from ours, and kept."""

from __future__ import annotations

import os

from quadriga.checkpoint.files import Files, Location, files_at, local
from quadriga.checkpoint.manifest import METADATA, STATE_FILE, TOKEN
from quadriga.checkpoint.plan_format import PLAN_FILE

HF_INDEX = "model.safetensors.index.json"  # of a last save in Hugging Face's form
SHARDED = "sharded"  # the folder in such a save that holds what each rank wrote
SHARDS = (".safetensors", ".distcp")


def has_foreign_plan(files: Files, path: Location) -> bool:
    """Whether a folder has DCP's plan, and nothing that every checkpoint of ours has. Its plan is not read."""
    names = set(files.names(path))
    return METADATA in names and not names & {STATE_FILE, PLAN_FILE}


def has_foreign_plan_on_disk(path: Location) -> bool:
    """`has_foreign_plan`, of what is in a file system; False where there is no such folder."""
    files = files_at(path)
    try:
        return files.renames and has_foreign_plan(files, path)
    except OSError:
        return False


def has_foreign_weights(files: Files, path: Location) -> bool:
    """Whether a folder (no link to one) holds weights, and nothing that every checkpoint of ours has. One that
    a kill cut off counts: its shards may lack their plan, or lie in `sharded` alone."""
    if files.renames and os.path.islink(local(path)):
        return False
    names = set(files.names(path))
    weights = names & {METADATA, HF_INDEX, SHARDED} or any(name.endswith(SHARDS) for name in names)
    return bool(weights) and not names & {STATE_FILE, PLAN_FILE}


def has_hugging_face_weights(files: Files, path: Location) -> bool:
    """Whether a folder holds weights in Hugging Face's form, not only what each rank wrote of them."""
    return any(name == HF_INDEX or name.endswith(".safetensors") for name in files.names(path))


def backup_path(files: Files, folder: str, step: int) -> str:
    """A free name for another trainer's step N, whose place a save of ours takes. No trainer takes it for a step."""
    name, number = f"{folder.rstrip('/')}/step_{step}.theirs", 1
    while files.exists(name):
        number += 1
        name = f"{folder.rstrip('/')}/step_{step}.theirs-{number}"
    return name


def remove_unless_foreign(files: Files, path: Location) -> None:
    if not has_foreign_weights(files, path):
        files.remove(path)


def remove_saves(files: Files, path: Location, keep: str = "") -> None:
    """On an object store: the files of our saves of a step, but those of the save `keep`. What another trainer left
    under the same name stays."""
    for name in files.names(path):
        if TOKEN.fullmatch(name) and name != keep:
            files.remove(f"{path}/{name}")


def remove_step(files: Files, path: Location) -> None:
    """On an object store: a checkpoint of ours. It is none as soon as its manifest is gone."""
    manifest = f"{path}/{STATE_FILE}"
    files.remove(manifest)
    if all(TOKEN.fullmatch(name) for name in files.names(path)):
        files.remove(path)  # at once, with a folder that holds nothing more, where the store has folders
    else:
        remove_saves(files, path)
