"""Checkpoints in an object store: published by one small object, tried again when a request fails, never half there."""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from weights import Weights

from quadriga.checkpoint import files as storage
from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.cli.main import main
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError


class Weak(MemoryFileSystem):
    """An object store in memory whose requests can fail, and which can end for good, as a killed process does."""

    protocol = "weak"
    cachable = False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures = 0  # requests that fail before one succeeds
    left = 10**9  # requests until the end
    requests: ClassVar[list] = []  # (what, the last two words of the path)

    @classmethod
    def request(cls, what="", path=""):
        if not path.endswith((".tmp", ".try")):  # the first is DCP's, which writes its plan under another name first
            cls.requests.append((what, "/".join(path.split("/")[-2:])))
        if cls.failures:
            cls.failures -= 1
            raise OSError("503 slow down")
        cls.left -= 1
        if cls.left < 0:
            raise KeyboardInterrupt("killed")

    def pipe_file(self, path, value, **keys):
        self.request("write", path)
        return super().pipe_file(path, value, **keys)

    def rm_file(self, path):
        self.request("delete", path)
        return super().rm_file(path)

    def _open(self, path, mode="rb", **keys):
        self.request("write" if "w" in mode else "read", path)
        return super()._open(path, mode, **keys)


fsspec.register_implementation("weak", Weak, clobber=True)


def manager(url: str, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), url)


def loaded(url: str) -> tuple[int, float] | None:
    """Step and value of what a start takes."""
    one, weights = manager(url), Weights(0)
    found = one.find()
    if found is None:
        return None
    one.load(found, {"model": weights})
    (value,) = set(weights.held["a.weight"].flatten().tolist())
    return found.step, value


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.001)
    Weak.failures, Weak.left, Weak.requests = 0, 10**9, []
    return f"weak://bucket/{uuid.uuid4().hex}"


def test_saves_and_resumes_in_memory():
    url = f"memory://bucket/{uuid.uuid4().hex}"
    one = manager(url, keep_latest_k=2, keep_every=10)
    for step in (10, 12, 14, 16):
        one.save(step, {"model": Weights(step)}, {})
    assert loaded(url) == (16, 16.0)
    assert storage.files_at(url).names(url) == ["step-10", "step-14", "step-16"]


@pytest.mark.parametrize("kept", [2, 0])
def test_a_kill_at_any_request_leaves_the_old_or_the_new(url, kept):
    """Cut off after n requests, for every n: a start takes one of the two whole ones and cleans up the rest."""
    outcomes = set()
    for requests in range(100):
        Weak.left = 10**9
        place = f"{url}/{requests}"
        one = manager(place, keep_latest_k=kept)
        one.save(3, {"model": Weights(3)}, {})
        one.save(8, {"model": Weights(8)}, {})
        Weak.left = requests
        with suppress(KeyboardInterrupt):
            one.save(8, {"model": Weights(88)}, {})  # over the published one: the hard case
        ended = Weak.left >= 0
        Weak.left = 10**9
        outcomes.add(loaded(place))
        assert loaded(place) in ((8, 8.0), (8, 88.0))
        assert not ended or loaded(place) == (8, 88.0)
        assert len(storage.files_at(place).names(f"{place}/step-8")) == 2, "a manifest and one set of files"
        if ended:
            break
    assert ended
    assert outcomes == {(8, 8.0), (8, 88.0)}


def test_a_first_save_that_was_cut_off_is_no_checkpoint(url):
    one = manager(url)
    Weak.left = 2
    with pytest.raises(KeyboardInterrupt):
        one.save(8, {"model": Weights(8)}, {})
    Weak.left = 10**9
    assert folders.unpublished_in(url) == ["step-8"]
    assert loaded(url) is None
    assert storage.files_at(url).names(url) == []


def test_failed_requests_are_tried_again(url):
    one = manager(url, storage_retries=3)
    Weak.failures = 3
    one.save(3, {"model": Weights(3)}, {})
    Weak.failures = 3
    assert loaded(url) == (3, 3.0)
    Weak.failures = 4
    with pytest.raises(folders.CheckpointError, match="503 slow down"):
        one.save(4, {"model": Weights(4)}, {}, last=True)
    Weak.failures = 0
    assert loaded(url) == (3, 3.0)


def test_damage_is_seen(url):
    one = manager(url)
    for step in (3, 8):
        one.save(step, {"model": Weights(step)}, {})
    files, place = storage.files_at(url), folders.find_complete(url).location
    whole = files.read(f"{place}/__0_0.distcp")
    files.write(f"{place}/__0_0.distcp", whole[:-1] + bytes([whole[-1] ^ 4]))
    assert loaded(url) == (3, 3.0)


def test_a_url_without_a_driver_names_what_to_install(tmp_path):
    with pytest.raises(UserError) as refused:
        manager("s3://bucket/run").find()
    assert "pip install s3fs" in refused.value.report
    with pytest.raises(UserError, match="nosuch"):
        manager("nosuch://bucket/run").find()


def test_nothing_is_deleted_before_the_manifest_that_replaces_it_is_written(url):
    one = manager(url, keep_latest_k=2)
    for step in (3, 5):
        one.save(step, {"model": Weights(step)}, {})
    Weak.requests = []
    one.save(5, {"model": Weights(55)}, {})  # over the published one
    writes = [at for at, (what, _) in enumerate(Weak.requests) if what == "write"]
    deletes = [at for at, (what, _) in enumerate(Weak.requests) if what == "delete"]
    assert Weak.requests[writes[-1]] == ("write", "step-5/train_state.json")
    assert len(deletes) >= 2, "those of the save before"
    assert min(deletes) > writes[-1]
    Weak.requests = []
    one.save(8, {"model": Weights(8)}, {})
    deletes = [path for what, path in Weak.requests if what == "delete"]
    assert deletes[0] == "step-3/train_state.json", "without its manifest it is no checkpoint any more"
    assert Weak.requests.index(("write", "step-8/train_state.json")) < Weak.requests.index(("delete", deletes[0]))


@pytest.mark.parametrize("over", [False, True])
def test_a_delete_that_fails_is_no_failed_save(url, monkeypatch, caplog, over):
    """Whether of older steps or of the save before of this step: what is published stays, files and all."""
    one = manager(url, keep_latest_k=2, storage_retries=0)
    for step in (3, 5):
        one.save(step, {"model": Weights(step)}, {})

    real = Weak.rm_file

    def refuse(self, path):
        if not path.endswith(".tmp"):  # of DCP, which writes its plan under another name first
            raise PermissionError(13, "may not delete", path)
        real(self, path)

    monkeypatch.setattr(Weak, "rm_file", refuse)
    step = 5 if over else 8
    one.save(step, {"model": Weights(step + 50)}, {}, last=True)
    monkeypatch.undo()
    assert loaded(url) == (step, step + 50.0)


def test_a_manifest_that_was_written_though_its_request_failed_keeps_its_files(url, monkeypatch):
    """The answer was lost, not the object: its files must not be taken for those of a failed save."""
    one = manager(url, storage_retries=0)
    one.save(3, {"model": Weights(3)}, {})
    real = Weak.pipe_file

    def lost(self, path, value, **keys):
        real(self, path, value, **keys)
        if path.endswith("train_state.json"):
            raise OSError("connection reset")

    monkeypatch.setattr(Weak, "pipe_file", lost)
    with pytest.raises(folders.CheckpointError, match="step 8 was not saved"):
        one.save(8, {"model": Weights(8)}, {}, last=True)
    monkeypatch.undo()
    assert loaded(url) == (8, 8.0)


@pytest.mark.parametrize("scheme", ["weak", "memory"])
def test_what_another_trainer_saved_there_is_named_and_kept(scheme, url, monkeypatch, caplog):
    """Beside a save of ours of the same step, too, as it is replaced, deleted and cleaned up after a kill."""
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    url = url.replace("weak://", f"{scheme}://")
    files = storage.files_at(url)
    theirs = [f"{url}/step-{step}/{name}" for step in (3, 5) for name in (".metadata", "__0_0.distcp", "sharded/a")]
    for path in theirs:
        files.write(path, path.encode())
    one = manager(url, keep_latest_k=2)
    assert one.find() is None
    assert "saved by another trainer, skipped and kept: step-3, step-5" in caplog.text
    assert main(["checkpoints", url]) == 0
    for step, value in ((3, 3), (5, 5), (5, 55), (8, 8), (9, 9)):  # the last two take the place of 3 and 5
        one.save(step, {"model": Weights(value)}, {})
        assert folders.find_complete(url).step == step
    files.write(f"{url}/step-5/{uuid.uuid4().hex}/__0_0.distcp", b"of a save that a kill cut off")
    files.write(f"{url}/step-9/notes.txt", b"mine")
    files.write(f"{url}/step-9/{uuid.uuid4().hex}/__0_0.distcp", b"of a save that a kill cut off")
    assert loaded(url) == (9, 9.0)
    assert {path: files.read(path) for path in theirs} == {path: path.encode() for path in theirs}
    assert len(files.names(f"{url}/step-9")) == 3, "a manifest, one set of files, and what is not ours"
    assert files.names(f"{url}/step-3") == [".metadata", "__0_0.distcp", "sharded"]
