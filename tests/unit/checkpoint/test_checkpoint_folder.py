"""Names on disk: what a reader takes, what it passes over, what is deleted and what never is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.folder import InvalidCheckpoint


def save(place, step, extra=None):
    folders.prepare(place, step)
    (Path(folders.staging_path(place, step)) / "__0_0.distcp").write_bytes(b"tensors" * min(step, 10))
    (Path(folders.staging_path(place, step)) / ".metadata").write_bytes(b"where they lie")
    return Path(folders.publish(place, step, ("model", "optimizer"), extra or {}))


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_a_published_checkpoint_is_found_with_what_it_holds(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 10, {"train_state": {"tokens": 5}})
    found = folders.find_complete(tmp_path)
    assert (found.step, found.extra, found.contents) == (10, {"train_state": {"tokens": 5}}, ("model", "optimizer"))
    assert folders.find_complete(tmp_path, 9).step == 9
    assert folders.find_complete(tmp_path, 8) is None
    assert names(tmp_path) == ["step-10", "step-9"]


def test_an_empty_or_missing_folder_has_none(tmp_path):
    assert folders.find_complete(tmp_path) is None
    assert folders.find_complete(tmp_path / "none") is None


def test_what_is_not_published_is_not_found_and_cleaned_up(tmp_path):
    save(tmp_path, 5)
    folders.prepare(tmp_path, 6)
    (tmp_path / ".step-6.saving" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".step-1.deleting").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert folders.find_complete(tmp_path).step == 5
    assert len(folders.clean_up(tmp_path)) == 2
    assert names(tmp_path) == ["notes.txt", "step-5"]


def test_a_kill_while_replacing_loses_neither(tmp_path):
    """The old folder is gone from its name and the new one not yet there: the next start finishes the renaming."""
    save(tmp_path, 5, {"which": "old"})
    name = save(tmp_path, 6, {"which": "new"})
    (tmp_path / "step-5").rename(tmp_path / ".step-5.deleting")
    state = json.loads((name / folders.STATE_FILE).read_text())
    state["step"] = 5
    (name / folders.STATE_FILE).write_text(folders.format_manifest(state))
    name.rename(folders.staging_path(tmp_path, 5))
    folders.clean_up(tmp_path)
    assert folders.find_complete(tmp_path).extra == {"which": "new"}
    assert names(tmp_path) == ["step-5"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_kill_just_before_replacing_loses_nothing_either(tmp_path, is_damaged):
    """Whole under its hidden name, with the older one still under the name that it was about to take."""
    new = save(tmp_path, 40, {"which": "new"})
    new.rename(tmp_path / "aside")
    old = save(tmp_path, 40, {"which": "old"})
    if is_damaged:  # why the run went back
        (old / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "aside").rename(folders.staging_path(tmp_path, 40))
    assert folders.clean_up(tmp_path) == ["step-40: finished, replacing an older one"]
    assert folders.find_complete(tmp_path).extra == {"which": "new"}
    assert names(tmp_path) == ["step-40"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, 5, {"which": "old"})
    save(tmp_path, 5, {"which": "new"})
    assert folders.find_complete(tmp_path).extra == {"which": "new"}
    assert names(tmp_path) == ["step-5"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"x"), "has 1 bytes instead of 70"),
        (lambda path: (path / "train_state.json").unlink(), "train_state.json cannot be read"),
        (lambda path: (path / "train_state.json").write_text("{"), "train_state.json is damaged"),
        (lambda path: (path / "train_state.json").write_text("[]"), "train_state.json is damaged"),
        (lambda path: (path / "train_state.json").write_text('{"format": "other"}'), "has format 'other'"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage, expected):
    save(tmp_path, 9)
    damage(save(tmp_path, 10))
    assert folders.find_complete(tmp_path).step == 9
    (reason,) = folders.damaged_in(tmp_path)
    assert expected in reason
    with pytest.raises(InvalidCheckpoint):
        folders.read_checkpoint(tmp_path / "step-10")
    assert folders.delete_old(tmp_path, 1) == [], "the only whole one stays, and a damaged one is not ours to delete"


@settings(max_examples=30)
@given(steps=st.sets(st.integers(0, 10**6), max_size=6), keep=st.integers(0, 7), every=st.sampled_from((0, 2, 3)))
def test_retention_keeps_the_newest_and_every_nth(tmp_path_factory, steps, keep, every):
    place = tmp_path_factory.mktemp("kept")
    for step in steps:
        save(place, step)
    gone = folders.delete_old(place, keep, every)
    left = [found.step for found in folders.whole_in(place)]
    newest = sorted(steps)[-keep:] if keep else sorted(steps)
    assert left == [step for step in sorted(steps) if step in newest or (every and step % every == 0)]
    assert sorted([*gone, *left]) == sorted(steps)


def test_what_is_no_json_leaves_no_checkpoint(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, {"loader": object()})
    assert folders.find_complete(tmp_path) is None
