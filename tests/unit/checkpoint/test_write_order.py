"""What is on the disk when a checkpoint gets its name: a file system that records flushes, renames and removals.

A flush (`fsync`) of a file makes its content durable, one of a folder the names in it. A power failure may undo all
else, in any order. So when `step-N` appears everything in it must have been flushed as it is, and what it replaces may
go only when its own name was flushed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from weights import Weights

from quadriga.checkpoint.manager import CheckpointManager
from quadriga.config.schema import Checkpoint


class Disk:
    """Follows the flushes of this process. `faults`: what a power failure could have undone when it must not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.flushed: dict[str, object] = {}  # by path: the state that is on the disk
        self.published: list[str] = []
        self.removed: list[str] = []
        self.faults: list[str] = []
        self._folder = str(folder)
        for module, name in ((os, "fsync"), (os, "fdatasync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, real):
        def flush(handle):
            real(handle)
            path = os.readlink(f"/proc/self/fd/{handle}")
            self.flushed[path] = state(path)

        def rename(source, target, **keys):
            if Path(target).name.startswith("step-"):
                self.published.append(Path(target).name)
                self._check_content(str(source))
            real(source, target, **keys)
            self.flushed[str(target)] = self.flushed.pop(str(source), None)  # the content stays where it is

        def remove(path, **keys):
            self.removed.append(Path(path).name)
            self._check_names(f"when {Path(path).name} was removed")
            real(path, **keys)

        return {"fsync": flush, "fdatasync": flush, "rmtree": remove}.get(real.__name__, rename)

    def _check_content(self, source: str) -> None:
        for path in (source, *(os.path.join(source, name) for name in os.listdir(source))):
            if self.flushed.get(path) != state(path):
                self.faults.append(f"{os.path.basename(path)} was not flushed before the rename")
        if "train_state.json" not in os.listdir(source):
            self.faults.append("renamed before the manifest was written")

    def _check_names(self, when: str) -> None:
        if self.flushed.get(self._folder) != state(self._folder):
            self.faults.append(f"the names of the folder were not flushed {when}")

    def end(self) -> None:
        self._check_names("at the end of a save") if not self.removed else None


def state(path: str) -> object:
    """What a flush covers: of a folder its names, of a file its content."""
    if os.path.isdir(path):
        return sorted(os.listdir(path))
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "a" / "checkpoint"
    disk = Disk(monkeypatch, folder)
    one = CheckpointManager(Checkpoint(enable=True), folder)
    for above in (folder, *folder.parents[:2]):
        assert above.name in disk.flushed[str(above.parent)], f"the name {above.name} is not on the disk"
    one.save(3, {"model": Weights(3)}, {"train_state": {"step": 3}})
    disk.end()
    assert disk.published == ["step-3"]
    assert {"__0_0.distcp", ".metadata", "train_state.json"} <= {Path(path).name for path in disk.flushed}
    assert disk.faults == []


def test_what_is_replaced_or_outdated_goes_when_the_new_name_is_on_the_disk(tmp_path, monkeypatch):
    one = CheckpointManager(Checkpoint(enable=True, keep_latest_k=2), tmp_path)
    for step in (3, 5):
        one.save(step, {"model": Weights(step)}, {})
    disk = Disk(monkeypatch, tmp_path)
    one.save(5, {"model": Weights(55)}, {})
    assert (disk.published, disk.removed) == (["step-5"], [".step-5.deleting"])
    assert disk.faults == []


def test_an_older_save_gets_its_name_back_when_the_rename_fails(tmp_path, monkeypatch):
    one = CheckpointManager(Checkpoint(enable=True, on_save_failure="go_on"), tmp_path)
    one.save(3, {"model": Weights(3)}, {})
    real = os.rename

    def full(source, target, **keys):
        if str(source).endswith(".saving"):
            raise OSError(28, "No space left on device", str(target))
        real(source, target, **keys)

    monkeypatch.setattr(os, "rename", full)
    one.save(3, {"model": Weights(33)}, {})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-3"]
    weights = Weights(0)
    one.load(one.find(), {"model": weights})
    assert weights.held["a.weight"].eq(3).all()
