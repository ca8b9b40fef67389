"""Checkpoints that somebody made to run code, to read what they should not, or to exhaust the machine. For tests.

Each function of `ATTACKS` changes a whole folder `step-N` of ours. If anything of it is executed, the file `flag` comes
to be. `reseal_manifest` makes the manifest fit, as an attacker can: its hash holds no secret.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from quadriga.checkpoint.files import LocalFiles
from quadriga.checkpoint.folder import STATE_FILE, format_manifest, sha256


class CommandPickle:
    """A pickle that runs a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def reseal_manifest(step: Path) -> None:
    manifest = step / STATE_FILE
    state = json.loads(manifest.read_text())
    state["files"] = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(LocalFiles(), file)}
        for file in sorted(step.iterdir())
        if file.name != STATE_FILE
    }
    manifest.write_text(format_manifest(state))


def metadata_of(step: Path) -> Metadata:
    return pickle.loads((step / ".metadata").read_bytes())  # of a checkpoint that the test has made itself


def a_weight(metadata: Metadata) -> str:
    return next(name for name in metadata.state_dict_metadata if name.startswith("model."))


def without_plan(step: Path, content: bytes) -> None:
    (step / "plan.json").unlink(missing_ok=True)
    (step / ".metadata").write_bytes(content)


def second_unpickling_differs(step: Path, flag: Path, protocol: int = 2) -> None:
    """An entry that is a tensor when it is checked, and pickled bytes when it is used: `__setstate__` of `Metadata` is
    replaced by BUILD on the class itself, and `__class__` by BUILD on an entry."""
    metadata = metadata_of(step)
    name = a_weight(metadata)
    real = metadata.state_dict_metadata[name]
    torch.save(CommandPickle(flag), step / "__9_0.distcp")
    size = (step / "__9_0.distcp").stat().st_size
    entry = type("Entry", (), {})()
    metadata.state_dict_metadata[name] = entry
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__9_0.distcp", 0, size)
    state = {"size": real.size, "properties": real.properties, "chunks": real.chunks}

    class Pickler(pickle._Pickler):
        def reducer_override(self, value: Any) -> Any:
            if value is entry:
                return BytesStorageMetadata, (), (state, {"__class__": TensorStorageMetadata})
            return NotImplemented

    def named(cls: str) -> bytes:
        if protocol < 4:
            return b"ctorch.distributed.checkpoint.metadata\n" + cls.encode() + b"\n"
        module = b"torch.distributed.checkpoint.metadata"
        return b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(cls)]) + cls.encode() + b"\x93"

    written = io.BytesIO()
    Pickler(written, protocol).dump(metadata)
    swap = b"(N}X\x0c\x00\x00\x00__setstate__" + named("BytesStorageMetadata") + b"stb0."
    without_plan(step, written.getvalue()[:-1] + named("Metadata") + swap)


def second_unpickling_differs_in_a_later_protocol(step: Path, flag: Path) -> None:
    second_unpickling_differs(step, flag, protocol=4)


def build_on_a_class(step: Path, flag: Path) -> None:
    body = pickle.dumps(metadata_of(step), 4)
    name = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x0dMetadataIndex\x93"
    without_plan(step, body[:2] + name + b"(N}\x8c\x08__hash__\x8c\x05posix\x8c\x06system\x93stb0" + body[2:])


def class_is_swapped(step: Path, flag: Path) -> None:
    metadata = metadata_of(step)
    metadata.state_dict_metadata[a_weight(metadata)].__dict__["__class__"] = BytesStorageMetadata
    without_plan(step, pickle.dumps(metadata))


def a_command_is_called(step: Path, flag: Path) -> None:
    metadata = metadata_of(step)
    metadata.planner_data = {"a": CommandPickle(flag)}
    without_plan(step, pickle.dumps(metadata))


def bytes_are_planned(step: Path, flag: Path) -> None:
    """What is a tensor for the run is pickled bytes here: DCP's own planner would unpickle them."""
    metadata = metadata_of(step)
    name = a_weight(metadata)
    torch.save(CommandPickle(flag), step / "__9_0.distcp")
    size = (step / "__9_0.distcp").stat().st_size
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__9_0.distcp", 0, size)
    without_plan(step, pickle.dumps(metadata))


def plan_and_metadata_are_forged(step: Path, flag: Path) -> None:
    """`.metadata` would run a command; `plan.json` calls pickled bytes a tensor."""
    (step / ".metadata").write_bytes(pickle.dumps(CommandPickle(flag)))
    torch.save([CommandPickle(flag), bytes(100_000)], step / "__9_0.distcp")
    _change_plan(step, lambda chunk, files: _at(chunk, files, "__9_0.distcp", step))


def a_shard_is_a_pickle(step: Path, flag: Path) -> None:
    """Not even an archive."""
    (step / "__9_0.distcp").write_bytes(pickle.dumps(CommandPickle(flag)) + bytes(4000))
    _change_plan(step, lambda chunk, files: _at(chunk, files, "__9_0.distcp", step))


def a_shard_calls_what_torch_holds_to_be_safe(step: Path, flag: Path) -> None:
    """`weights_only` lets a pickle make a `DeviceMesh`, which waits for other ranks."""
    mesh = b"\x80\x02ctorch.distributed.device_mesh\nDeviceMesh\nX\x03\x00\x00\x00cpu]K\x00a\x86R."
    with zipfile.ZipFile(step / "__9_0.distcp", "w") as archive:
        archive.writestr("archive/data.pkl", mesh)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(4000))
    _change_plan(step, lambda chunk, files: _at(chunk, files, "__9_0.distcp", step))


def a_shard_is_inflated(step: Path, flag: Path) -> None:
    """An archive of a few bytes that becomes very many."""
    saved = io.BytesIO()
    torch.save(torch.zeros(1000), saved)
    with zipfile.ZipFile(saved) as plain, zipfile.ZipFile(step / "__9_0.distcp", "w", zipfile.ZIP_DEFLATED) as archive:
        for record in plain.namelist():
            archive.writestr(record, plain.read(record))
        archive.writestr("archive/data/1", bytes(20_000_000))
    _change_plan(step, lambda chunk, files: _at(chunk, files, "__9_0.distcp", step))


def a_shard_has_another_dtype(step: Path, flag: Path) -> None:
    plan = json.loads((step / "plan.json").read_text())
    name = next(name for name in plan["tensors"] if name.startswith("model."))
    shape = plan["tensors"][name]["chunks"][0][1]
    torch.save(torch.zeros(shape, dtype=torch.float64), step / "__9_0.distcp")
    _change_plan(step, lambda chunk, files: _at(chunk, files, "__9_0.distcp", step))


def a_chunk_lies_outside(step: Path, flag: Path) -> None:
    _change_plan(step, lambda chunk, files: chunk.__setitem__(3, chunk[3] + 10**9))


def a_chunk_lies_outside_in_metadata(step: Path, flag: Path) -> None:
    metadata = metadata_of(step)
    for info in metadata.storage_data.values():
        info.offset += 10**9
    without_plan(step, pickle.dumps(metadata))


def numbers_are_huge(step: Path, flag: Path) -> None:
    plan = json.loads((step / "plan.json").read_text())
    for entry in plan["tensors"].values():
        entry["shape"] = [10**18 for _ in entry["shape"]]
        entry["chunks"] = [[offsets, entry["shape"], *rest] for offsets, _, *rest in entry["chunks"]]
    (step / "plan.json").write_text(json.dumps(plan))


def a_file_is_elsewhere(step: Path, flag: Path) -> None:
    _change_plan(step, lambda chunk, files: files.__setitem__(chunk[2], "../../../../etc/passwd"))


def a_shard_is_a_link(step: Path, flag: Path) -> None:
    shard = step / "__0_0.distcp"
    shard.rename(step.parent / "elsewhere")
    shard.symlink_to(step.parent / "elsewhere")


def chunks_leave_a_hole(step: Path, flag: Path) -> None:
    metadata = metadata_of(step)
    entry = metadata.state_dict_metadata[a_weight(metadata)]
    entry.chunks = [ChunkStorageMetadata(entry.chunks[0].offsets, torch.Size([1 for _ in entry.size]))]
    without_plan(step, pickle.dumps(metadata))


def _change_plan(step: Path, change: Callable[[list[Any], list[str]], object]) -> None:
    """Change the first chunk of the first weight in `plan.json`."""
    plan = json.loads((step / "plan.json").read_text())
    name = next(name for name in plan["tensors"] if name.startswith("model."))
    change(plan["tensors"][name]["chunks"][0], plan["files"])
    (step / "plan.json").write_text(json.dumps(plan))


def _at(chunk: list[Any], files: list[str], file: str, step: Path) -> None:
    files.append(file)
    chunk[2:5] = [len(files) - 1, 0, (step / file).stat().st_size]


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    attack.__name__: attack
    for attack in (
        *(second_unpickling_differs, second_unpickling_differs_in_a_later_protocol, build_on_a_class),
        *(class_is_swapped, a_command_is_called, bytes_are_planned, plan_and_metadata_are_forged),
        *(a_shard_is_a_pickle, a_shard_calls_what_torch_holds_to_be_safe, a_shard_is_inflated),
        *(a_shard_has_another_dtype, a_chunk_lies_outside, a_chunk_lies_outside_in_metadata),
        *(numbers_are_huge, a_file_is_elsewhere, a_shard_is_a_link, chunks_leave_a_hole),
    )
}
