"""Reads the tensors of a checkpoint: its plan, which is read and checked once, and a reader of its tensors for DCP.

    stored = open_stored(place, group, found.files)       # all ranks together
    stored.plan.tensors                                   # names, dtypes, shapes
    load(tensors, storage_reader=stored.reader(tensors), planner=TensorPlanner(), ...)

The first rank reads the plan and sends it to the others as JSON. DCP gets objects that are built from the checked plan,
never the file. Nothing is unpickled: see SECURITY.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from quadriga import limits
from quadriga.checkpoint import metadata_file
from quadriga.checkpoint import plan as plans
from quadriga.checkpoint.files import Files, Location, files_at, local
from quadriga.checkpoint.folder import CheckpointError, FileFacts, join
from quadriga.checkpoint.plan import PLAN_FILE, Plan, PlanError
from quadriga.checkpoint.shards import Slice, read_chunk
from quadriga.json_collectives import broadcast_bytes, broadcast_json, error_from_json, error_to_json

METADATA = ".metadata"  # DCP's own plan, a pickle


class StoredTensors:
    """The tensors in a folder or object store. Its methods can be called on a single rank."""

    def __init__(self, location: Location, plan: Plan, retries: int = 5) -> None:
        self.location, self.plan = str(location), plan
        self._files = files_at(location, retries)

    def reader(self, names: Iterable[str]) -> TensorReader:
        """A DCP reader of these tensors. Raises KeyError for a name that is not in the plan."""
        return TensorReader(self.location, self._files, self.plan.metadata(names))


def open_stored(
    location: Location, group: dist.ProcessGroup | None, facts: Mapping[str, FileFacts] | None = None, retries: int = 5
) -> StoredTensors:
    """The tensors in a folder or object store. `facts`: the files in the manifest; empty or None: no manifest.

    Call on all ranks of the group. Raises CheckpointError on every rank if the plan is missing or damaged, or refers to
    anything except tensors in the files of this folder."""
    if group is None:
        return StoredTensors(location, _read_plan(location, facts or {}, retries)[0], retries)
    plan, text, error = None, b"", None
    if dist.get_rank(group) == 0:
        try:
            plan, text = _read_plan(location, facts or {}, retries)
            text = text or _as_text(location, plan)
        except Exception as failed:  # noqa: BLE001 - the other ranks must not wait forever
            error = failed
    error_record = broadcast_json(None if error is None else error_to_json(error), group)
    if error is not None:
        raise error
    if error_record is not None:
        raise error_from_json(error_record, CheckpointError)
    text = broadcast_bytes(text, group)
    return StoredTensors(location, plan or plans.parse_plan(text), retries)


def _read_plan(location: Location, facts: Mapping[str, FileFacts], retries: int) -> tuple[Plan, bytes]:
    """The plan, and its JSON text if `plan.json` was read, else b""."""
    files, name = files_at(location, retries), METADATA
    try:
        if PLAN_FILE in facts if facts else files.exists(join(location, PLAN_FILE)):
            name = PLAN_FILE
            text = _content(files, location, name, limits.PLAN_BYTES, facts.get(name))
            plan = plans.parse_plan(text)
        else:
            text, plan = (
                b"",
                metadata_file.read_plan(_content(files, location, name, limits.METADATA_BYTES, facts.get(name))),
            )
        plans.check_files(plan, {file: _size(files, location, file, facts) for file in plan.files})
        return plan, text
    except PlanError as error:
        raise refusal_error(join(location, name), error) from error
    except OSError as error:
        raise CheckpointError(f"{join(location, name)} cannot be read: {error.strerror or error}") from error


def _as_text(location: Location, plan: Plan) -> bytes:
    """The JSON text of a plan from `.metadata`. Raises CheckpointError if the other ranks would refuse the text."""
    text = plan.as_json()
    try:
        plans.check_text(text)
    except PlanError as error:
        raise refusal_error(join(location, METADATA), error) from error
    return text


def refusal_error(path: str, error: PlanError) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: {error}\n"
        "no code in this checkpoint was executed, and no tensor was loaded from it\n"
        "use another checkpoint of the run (checkpoint.load_step), or a copy from a source that you trust"
    )


def _content(files: Files, location: Location, name: str, most: int, fact: FileFacts | None) -> bytes:
    def look() -> bytes:
        with open_file(files, location, name) as file:
            return file.read(most + 1)

    content = files.retried(look)
    if len(content) > most:
        raise PlanError(f"longer than the limit for a plan ({most:,} bytes)")
    if fact is not None and hashlib.sha256(content).hexdigest() != fact.sha256:
        raise PlanError("its hash differs from the one in the manifest")
    return content


def open_file(files: Files, location: Location, name: str) -> IO[bytes]:
    """Opens a file of the folder. Links are refused, because they could lead to any file of this machine."""
    if files.renames and (local(location) / name).is_symlink():
        raise PlanError(f"{plans.format_raw(name)} is a link, not a file of this folder")
    return files.open(join(location, name), "rb")


def _size(files: Files, location: Location, name: str, facts: Mapping[str, FileFacts]) -> int:
    if facts:
        if name not in facts:
            raise PlanError(f"{plans.format_raw(name)} is not a file that the manifest lists")
        return facts[name].size  # compared with the file when the manifest was read
    try:
        return files.size(join(location, name))
    except OSError as error:
        raise PlanError(f"{plans.format_raw(name)}, a file of tensors: {error.strerror or error}") from error


class TensorPlanner(DefaultLoadPlanner):
    """Plans the load of tensors with flat names, and refuses all other objects."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Raises PlanError. DCP's own method would unpickle the object."""
        raise PlanError(f"{plans.format_raw(read_item.dest_index.fqn)} is a pickled object, which is not read")


class TensorReader(StorageReader):
    """Reads the tensors of a checked plan, as a storage reader of DCP."""

    def __init__(self, location: str, files: Files, metadata: Metadata) -> None:
        self._location, self._files, self._metadata = location, files, metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        return None

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # made by `StoredTensors.reader`, not found by DCP

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._files.retried(lambda: self._read(plan, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_file: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
        for item in plan.items:
            info = self._metadata.storage_data[item.storage_index]
            by_file.setdefault(info.relative_path, []).append((info, item))
        for name, items in by_file.items():
            path = join(self._location, name)
            try:
                with open_file(self._files, self._location, name) as file:
                    for info, item in sorted(items, key=lambda one: one[0].offset):
                        tensor = plans.format_raw(item.storage_index.fqn)
                        path = f"{join(self._location, name)} ({tensor} at byte {info.offset})"
                        self._fill(file, info, item, planner)
            except PlanError as error:
                raise refusal_error(path, error) from error

    def _fill(self, file: IO[bytes], info: _StorageInfo, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type is not LoadItemType.TENSOR:
            raise PlanError("is not a tensor")
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)  # a plan has no others
        assert item.storage_index.index is not None
        chunk, dtype = entry.chunks[item.storage_index.index], entry.properties.dtype
        if info.transform_descriptors:
            kinds = plans.format_raw(", ".join(info.transform_descriptors))
            raise PlanError(f"was saved with a transform ({kinds}), which is not supported: save it again without it")
        copy_part(read_chunk(Slice(file, info.offset, info.length), info.length, dtype, chunk.sizes), item, planner)


def copy_part(saved: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copies the part of a chunk that an item requests to its target. Raises PlanError if the shapes differ."""
    for dimension, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        saved = saved.narrow(dimension, start, size)
    target = planner.resolve_tensor(item).detach()
    if target.shape != saved.shape:
        raise PlanError(f"a part of shape {list(saved.shape)} for one of shape {list(target.shape)}")
    target.copy_(saved)
    planner.commit_tensor(item, target)
