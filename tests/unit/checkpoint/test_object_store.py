"""Checkpoints in an object store: published by one small object, tried again when a request fails, never half there."""

from __future__ import annotations

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

    @classmethod
    def request(cls):
        if cls.failures:
            cls.failures -= 1
            raise OSError("503 slow down")
        cls.left -= 1
        if cls.left < 0:
            raise KeyboardInterrupt("killed")

    def pipe_file(self, path, value, **keys):
        self.request()
        return super().pipe_file(path, value, **keys)

    def _rm(self, path):
        self.request()
        return super()._rm(path)

    def _open(self, path, mode="rb", **keys):
        self.request()
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
    Weak.failures, Weak.left = 0, 10**9
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
    files, place = storage.files_at(url), folders.find(url).place
    whole = files.read(f"{place}/__0_0.distcp")
    files.write(f"{place}/__0_0.distcp", whole[:-1] + bytes([whole[-1] ^ 4]))
    assert loaded(url) == (3, 3.0)


def test_a_url_without_a_driver_names_what_to_install(tmp_path):
    with pytest.raises(UserError) as refused:
        manager("s3://bucket/run").find()
    assert "pip install s3fs" in refused.value.report
    with pytest.raises(UserError, match="nosuch"):
        manager("nosuch://bucket/run").find()
