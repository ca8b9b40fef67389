"""Recognizes checkpoints of torchtitan (v0.2) by the names in them, and reads the state of their run. No torch here.

torchtitan saves a folder of torch.distributed.checkpoint without a manifest. It has, at the top level, the weights
(`layers.0.attention.wq.weight`), `optimizer.state.NAME.exp_avg`, `exp_avg_sq` and `step`,
`optimizer.param_groups.NAME.KEY`, `train_state.step` and `ntokens_seen`, `lr_scheduler.last_epoch`,
`dataloader.dp_rank_N` and `dataloader.world_size`. By default, its last save has only the weights.

There are no hashes. The only check is whether every tensor and value is inside an existing file. These folders are
never changed and never deleted.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from quadriga import limits
from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import foreign
from quadriga.checkpoint.files import Files, Location, files_at, is_url, join
from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo, InvalidCheckpoint
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.manifest import METADATA, STATE_FILE, is_file_name
from quadriga.checkpoint.messages import (
    compare_shapes,
    no_manifest,
    no_state,
    not_a_checkpoint,
    not_a_folder,
    refusal_error,
)
from quadriga.checkpoint.metadata_entries import Entries, read_entries
from quadriga.checkpoint.plain_values import value_in_archive, value_of
from quadriga.checkpoint.plan_format import LINK, PlanError, format_raw
from quadriga.errors import Problem, UserError
from quadriga.units import format_some

TRAINER = "torchtitan"
STATE = "optimizer.state."  # prefix of the names of moments
NON_WEIGHT_PREFIXES = (
    "optimizer.",
    "train_state.",
    "lr_scheduler.",
    "dataloader.",
)  # prefixes of all names that are not weights
EMBEDDING = "tok_embeddings.weight"
IN_LAYER = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")
LAYER = re.compile(r"layers\.(\d+)\.")
MOST_TOKENS = 1 << 53
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of Quadriga's names
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
FIX = "set model.flavor and its sizes to those of the run that saved it, or use another checkpoint"


def find_candidates(
    folder: Location, damaged: Iterable[tuple[int, str]]
) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
    """Splits folders that are not checkpoints of Quadriga, (step, why), into possible ones of torchtitan and others.

    A candidate must be checked with `inspect` before it is used."""
    files, theirs, left = files_at(folder), [], []
    for step, why in damaged:
        path = folders.published_path(folder, step)
        try:
            if foreign.has_foreign_plan(files, path):
                theirs.append(CheckpointInfo(step, path, (), location=path, trainer=TRAINER))
            elif foreign.has_foreign_weights(files, path):
                left.append((step, no_state(path, foreign.has_hugging_face_weights(files, path))))
            else:
                left.append((step, why))
        except OSError:
            left.append((step, why))
    return theirs, left


def list_all(folder: Location) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
    """The complete checkpoints of Quadriga and the candidates of torchtitan, by step; the others as (step, why).

    Raises UserError if something else has the name of the folder: for example a link to a disk that is not mounted. The
    run must not start anew."""
    if not is_url(folder) and os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(not_a_folder(str(folder)))
    whole, damaged = folders.list_checkpoints(folder)
    theirs, damaged = find_candidates(folder, damaged)
    return sorted([*whole, *theirs], key=lambda found: found.step), damaged


def inspect_candidate(path: str) -> tuple[CheckpointInfo | None, str]:
    """A candidate as `inspect` reads it; or None, and why it cannot be used."""
    try:
        return inspect(path), no_manifest(path)
    except InvalidCheckpoint as reason:
        return None, str(reason)


def find_newest(folder: Location, step: int = -1, least: int = 0) -> CheckpointInfo | None:
    """The newest checkpoint of Quadriga or torchtitan in a folder that is complete by name and size, or that of `step`;
    None if there is none. Of torchtitan's, only those are inspected that are newer than the newest of Quadriga's and
    not before step `least`, because this reads all of `.metadata`, which takes seconds for a large model."""
    own, files = folders.find_complete(folder, step), files_at(folder)
    if not files.renames:  # torchtitan saves only to folders
        return own
    named = sorted(int(match[1]) for name in files.names(folder) if (match := folders.PUBLISHED.fullmatch(name)))
    for number in reversed(named):
        path = folders.published_path(folder, number)
        if number < least or (own is not None and own.step >= number):
            break
        if step in (-1, number):
            with suppress(InvalidCheckpoint, OSError):
                if files.is_folder(path) and foreign.has_foreign_plan(files, path) and (found := inspect(path)):
                    return found
    return own


def inspect(path: Location) -> CheckpointInfo | None:
    """The checkpoint in a folder of torchtitan; None if its names are not torchtitan's.

    `extra` has the parts of a checkpoint of Quadriga, as far as they are known: `train_state` (`step`, `tokens_seen`),
    `lr_scheduler` (`done`), `dataloader` (`ranks`; and `documents` and `tokens_left`, or `unknown`, the reason).
    `resume` is False for step 0: only its weights are loaded, as in torchtitan.

    Raises InvalidCheckpoint if a file is missing or too short, or a value is not one that torchtitan saves.
    """
    files = files_at(path)
    try:
        entries = read_entries(_bytes(files, path, METADATA, 0, None, limits.METADATA_BYTES))
        if not _has_titan_names(entries):
            return None
        for name, kinds in entries.transformed.items():
            what = f"was saved with a transform ({format_raw(kinds)}), which is not supported: save it again without it"
            raise PlanError(f"{format_raw(name)} {what}")
        _check_files(entries, files, path)
        run_state = _RunState(entries, files, path)
        contents = ("model", "optimizer") if run_state.has_training else ("model",)
        extra = run_state.extra() if run_state.has_training else {}
    except PlanError as error:
        raise InvalidCheckpoint(f"{join(path, METADATA)}: {error}") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read ({error.strerror or error})") from error
    named = folders.step_in_name(path)
    step = extra["train_state"]["step"] if extra else named or 0
    if extra and named is not None and named != step:
        raise InvalidCheckpoint(f"{path} is of step {step}, but the name of its folder is of step {named}")
    return CheckpointInfo(step, str(path), contents, extra, resume=step > 0, location=str(path), trainer=TRAINER)


def find_at(path: Location) -> CheckpointInfo | None:
    """The checkpoint in a folder, or the newest of its subfolders; None for a folder of torch.distributed.checkpoint
    with other names. Raises InvalidCheckpoint if it is not a checkpoint."""
    if found := find_newest(path):
        return found
    try:
        return folders.read_checkpoint(path)
    except InvalidCheckpoint:
        files = files_at(path)
        # With a manifest, it is a checkpoint of Quadriga. It must not be loaded as a foreign one, without verification.
        if files.exists(join(path, STATE_FILE)) or not files.exists(join(path, METADATA)):
            raise
        return inspect(path) if foreign.has_foreign_plan(files, path) else None


def find_initial(path: str) -> CheckpointInfo | None:
    """`find_at` for `initial_load_path`: raises UserError if it is not a checkpoint."""
    try:
        return find_at(path)
    except InvalidCheckpoint as reason:
        raise UserError(not_a_checkpoint(path, reason)) from reason


def shapes_in(path: Location, *, checked: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors by their names in `.metadata`. Raises CheckpointError if it cannot be used; not
    `checked`: also if a file of tensors is missing or too short."""
    files, metadata = files_at(path), join(path, METADATA)
    try:
        entries = read_entries(_bytes(files, path, METADATA, 0, None, limits.METADATA_BYTES))
        if not checked:
            _check_files(replace(entries, objects={}), files, path)
    except PlanError as error:
        raise refusal_error(metadata, error) from error
    except OSError as error:
        raise CheckpointError(f"{metadata} cannot be read: {error.strerror or error}") from error
    return {name: tuple(entry["shape"]) for name, entry in entries.plan["tensors"].items()}


def refuse_other_titan_model(
    where: str,
    there: Mapping[str, tuple[int, ...]],
    names: TensorNames,
    parts: Iterable[str] = ("model",),
    moments: Iterable[str] = (),
) -> None:
    """Raises UserError if a checkpoint does not have exactly the weights of this model, or lacks moments."""
    shapes = names.shapes
    weights = {name for name in there if not name.startswith(NON_WEIGHT_PREFIXES)}
    wanted = dict(shapes) if "model" in parts else {}
    for name, key in itertools.product(shapes, moments):
        wanted[f"{STATE}{name}.{key}"] = () if key == "step" else shapes[name]
    missing, _, reshaped = compare_shapes(wanted, there, "checkpoint")
    surplus = sorted(weights - shapes.keys()) if "model" in parts else []
    if not (missing or surplus or reshaped):
        return
    saved, asked = _sizes({name: there[name] for name in weights}), _sizes(shapes)
    if saved and asked and saved != asked:  # a shorter message than names and shapes
        (layers, width, vocabulary), here = saved, ", ".join(f"{size:,}" for size in asked)
        what = f"the checkpoint has {layers:,} layers, width {width:,}, vocabulary {vocabulary:,}"
        raise UserError(Problem(where, f"another model: {what}; the configuration {here}", fix=FIX))
    kinds = (
        ("the checkpoint lacks", missing),
        ("only the checkpoint has", surplus),
        ("shapes differ:", sorted(reshaped)),
    )
    what = "; ".join(f"{kind} {format_some(names)}" for kind, names in kinds if names)
    raise UserError(Problem(where, f"another model: {what}", fix=FIX))


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Layers, width and vocabulary of a whole model; None without an embedding."""
    shape = shapes.get(EMBEDDING, ())
    layers = {match[1] for name in shapes if (match := LAYER.match(name))}
    return (len(layers), shape[1], shape[0]) if len(shape) == 2 else None


def titan_name(name: str) -> str:
    """torchtitan's name of a tensor: `optimizer.norm.weight.step` -> `optimizer.state.norm.weight.step`."""
    if name.startswith(MODEL):
        return name.removeprefix(MODEL)
    return STATE + name.removeprefix(OPTIMIZER)


def _has_titan_names(entries: Entries) -> bool:
    names = entries.plan["tensors"].keys()
    return EMBEDDING in names or any(IN_LAYER.fullmatch(name) for name in names)


class _RunState:
    """The state of a run: the values that are not tensors, read on request."""

    def __init__(self, entries: Entries, files: Files, path: Location) -> None:
        self._objects, self._files, self._path = entries.objects, files, path
        moments = any(name.startswith(STATE) for name in entries.plan["tensors"])
        self.has_training = moments and "train_state.step" in entries.objects

    def extra(self) -> dict[str, Any]:
        ranks = self._count("dataloader.world_size", least=1) if "dataloader.world_size" in self._objects else 0
        step = self._count("train_state.step")
        known = "train_state.ntokens_seen" in self._objects
        # Each data-parallel rank counts only its own tokens, and one of them saves its count.
        tokens = self._count("train_state.ntokens_seen", most=MOST_TOKENS) * max(ranks, 1) if known else None
        last = "lr_scheduler.last_epoch"
        return {
            "train_state": {"step": step, "tokens_seen": tokens},
            "lr_scheduler": {"done": self._count(last) if last in self._objects else step},
            "dataloader": {"ranks": ranks, **self._position(ranks)},
        }

    def _count(self, name: str, least: int = 0, most: int = limits.COUNT) -> int:
        value = self._value(name, limits.OBJECT_NUMBER_BYTES)
        if type(value) is not int or not least <= value <= most:
            raise PlanError(f"{name} is {format_raw(value)}, which is not a count")
        return value

    def _value(self, name: str, most: int = limits.OBJECT_BYTES) -> Any:
        file, start, length = self._objects[name]
        return value_in_archive(_bytes(self._files, self._path, file, start, length, most))

    def _position(self, ranks: int) -> dict[str, Any]:
        """The number of documents that the data loader has read, and of their ids that it has not returned yet."""
        name = "dataloader.dp_rank_0"
        if ranks != 1 or name not in self._objects:
            there = f"it was saved by {ranks} data-parallel ranks, each with its own part of the data"
            return {"unknown": there if ranks > 1 else "it has no state of a data loader"}
        try:
            content = self._value(name)
            state = value_of(content) if type(content) is bytes else None
            position = state.get("dataset_state") if type(state) is dict else None
            if type(state) is not dict or type(position) is not dict or type(state.get("_num_yielded")) is not int:
                return {"unknown": "its data loader has worker processes"}
            documents, buffer = position.get("sample_idx"), position.get("token_buffer")
        except PlanError as error:
            return {"unknown": f"the state of its data loader cannot be read: {error}"}
        if type(documents) is not int or not 0 <= documents <= limits.COUNT or type(buffer) is not list:
            return {"unknown": "its data were streamed, and their state has no document number"}
        return {"documents": documents, "tokens_left": len(buffer)}


def _check_files(entries: Entries, files: Files, path: Location) -> None:
    """Raises PlanError if a tensor or a value is not inside a file of this folder."""
    plan: Mapping[str, Any] = entries.plan
    ends: dict[str, int] = {}
    for entry in plan["tensors"].values():
        for _, _, file, start, length, *_ in entry["chunks"]:
            name = plan["files"][file]
            ends[name] = max(ends.get(name, 0), start + length)
    for name, start, length in entries.objects.values():
        ends[name] = max(ends.get(name, 0), start + length)
    for name, end in ends.items():
        if not is_file_name(name):
            raise PlanError(f"{format_raw(name)} is not a name of a file in the folder")
        try:
            size = files.size(join(path, name))
        except OSError as error:
            raise PlanError(f"{name} cannot be read ({error.strerror or error})") from error
        if size < end:
            raise PlanError(f"{name} has {size} bytes, and at least {end} are needed")


def _bytes(files: Files, path: Location, name: str, start: int, length: int | None, most: int) -> bytes:
    """Bytes of a file of the folder; `length` None: all. Raises PlanError for a link, which could lead anywhere, or for
    more than `most` bytes."""
    if length is not None and (length > most or length < 0 or start < 0):
        raise PlanError(f"{length} bytes of {name} from byte {start} on: not a valid length or position of a value")
    if files.is_link(join(path, name)):
        raise PlanError(f"{format_raw(name)} {LINK}")
    with files.open(join(path, name), "rb") as file:
        file.seek(start)
        content = file.read(most + 1 if length is None else length)
    if len(content) > most:
        raise PlanError(f"{name} is longer than the limit for a plan ({most:,} bytes)")
    return content
