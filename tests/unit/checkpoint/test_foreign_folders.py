"""What others may leave in a folder of checkpoints: links, FIFOs, copies, manifests that cannot be.

Nothing of it holds up a start, nothing outside is followed or removed, and the newest good checkpoint is taken.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.folder import CheckpointError, InvalidCheckpoint
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.cli.main import main
from quadriga.config.schema import Checkpoint
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, UserError


def save(place, step, extra=None):
    hidden = Path(folders.prepare(place, step))
    (hidden / "__0_0.distcp").write_bytes(b"tensors" * 10)
    (hidden / ".metadata").write_bytes(b"where they lie")
    return Path(folders.publish(place, step, ("model", "optimizer"), extra or {}))


def manager(place, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), place)


def tree(place) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in Path(place).rglob("*"))


def reseal(step_folder: Path, **changes) -> None:
    """A manifest that says something else, with a hash that fits it."""
    path = step_folder / folders.STATE_FILE
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(folders.format_manifest({key: value for key, value in state.items() if value is not ...}))


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    caplog.set_level(logging.INFO, "quadriga")
    return caplog


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "train_state.json"])
@pytest.mark.parametrize("replace_by", [dangling, loop, fifo, directory, device, sparse])
def test_what_is_no_file_to_read_is_named_and_the_one_before_is_taken(tmp_path, logged, file, replace_by):
    save(tmp_path, 3)
    replace_by(save(tmp_path, 8) / file)
    found = manager(tmp_path).find()
    assert found.step == 3
    assert str(tmp_path / "step-8" / file) in logged.text
    assert "this checkpoint is skipped" in logged.text
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert folders.delete_old(tmp_path, 1) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "lstat", "listdir", "open"])
def test_a_disk_or_server_that_does_not_answer(tmp_path, logged, monkeypatch, code, call):
    """Of the newest checkpoint: its files, its folder, its listing, or the content of a file."""
    save(tmp_path, 3)
    save(tmp_path, 8)
    real = getattr(os, call)

    def failing(path, *rest, **keys):
        name = os.fspath(path) if not isinstance(path, int) else ""
        inside = str(name).startswith(str(tmp_path / "step-8"))
        if inside and (call != "open" or str(name).endswith(".distcp")):
            raise OSError(code, os.strerror(code), name)
        return real(path, *rest, **keys)

    monkeypatch.setattr(os, call, failing)
    found = manager(tmp_path).find()
    monkeypatch.undo()
    assert found.step == 3
    assert str(tmp_path / "step-8") in logged.text
    assert os.strerror(code) in logged.text


@pytest.mark.parametrize("name", ["step-9", ".step-9.saving", ".step-9.deleting", ".try"])
@pytest.mark.parametrize("kind", ["link to a folder", "link to a checkpoint", "dangling", "loop", "file", "fifo"])
def test_what_is_no_folder_holds_up_no_start_and_no_save(tmp_path, logged, name, kind):
    place, outside = tmp_path / "checkpoint", tmp_path / "outside"
    place.mkdir()
    save(place, 3)
    save(outside, 9)
    (outside / "mine.txt").write_text("mine")
    before, path = tree(outside), place / name
    if kind == "file":
        path.write_text("x")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        ends = {"link to a folder": outside, "link to a checkpoint": outside / "step-9", "loop": path}
        path.symlink_to(ends.get(kind, "/nowhere"))
    one = manager(place)
    assert one.find().step == 3
    if name == "step-9":
        assert f"{path} is {'a link, which is not followed' if path.is_symlink() else 'not a folder'}" in logged.text
        assert main(["checkpoints", str(place)]) == 0
        assert folders.delete_old(place, 1) == []
    else:
        assert not os.path.lexists(path)
    save(place, 9)
    assert not path.is_symlink()
    assert folders.find_complete(place).step == 9
    assert tree(outside) == before
    assert sorted(os.listdir(place)) == ["step-3", "step-9"]


def test_a_link_alone_is_no_checkpoint_and_no_blocked_start(tmp_path, logged):
    (tmp_path / "step-9").symlink_to("/nowhere")
    assert manager(tmp_path).find() is None
    assert "a link, which is not followed" in logged.text
    with pytest.raises(UserError, match="load_step"):
        manager(tmp_path, load_step=9).find()


def test_a_folder_that_leads_nowhere_is_no_empty_one(tmp_path):
    """A disk that is not mounted: a run that only loads would begin anew in silence."""
    (tmp_path / "checkpoint").symlink_to("/nowhere/checkpoint")
    for keys in ({"load_only": True}, {}):
        with pytest.raises(UserError, match=r"checkpoint\.folder"):
            manager(tmp_path / "checkpoint", **keys).find()


def test_what_older_checkpoints_of_ours_say_is_not_of_a_newer_one_of_another_trainer(tmp_path):
    save(tmp_path, 10, {"seed": 7})
    theirs = tmp_path / "step-20"
    theirs.mkdir()
    (theirs / ".metadata").write_bytes(b"")
    assert folders.newest_extra(tmp_path) is None
    assert folders.newest_extra(tmp_path, 10)["seed"] == 7
    theirs.rename(tmp_path / "step-5")
    assert folders.newest_extra(tmp_path)["seed"] == 7
    (tmp_path / "step-30").mkdir()  # torn: nothing is in it
    assert folders.newest_extra(tmp_path)["seed"] == 7


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    save(tmp_path, 3)

    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Input/output error"):
        manager(tmp_path, load_only=True).find()
    with pytest.raises(UserError, match="cannot be listed"):
        folders.newest_extra(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "step-00009",
        "step--9",
        "step-+9",
        "step-9 ",
        "step-9\n",
        "step-\u0669",
        "step-1\u0669",
        "step-9.0",
        "step-",
        "Step-9",
    ],
)
def test_only_names_as_we_write_them_count(tmp_path, logged, name):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-3", tmp_path / name)
    hidden = tmp_path / f".{name}.saving"
    hidden.mkdir()
    assert manager(tmp_path).find().step == 3
    assert folders.damaged_in(tmp_path) == []
    assert folders.delete_old(tmp_path, 1) == []
    assert hidden.exists(), "not ours to remove"


def test_a_copy_under_another_step_is_named_and_passed_over(tmp_path, logged):
    for step in (2, 4):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-9")
    assert manager(tmp_path).find().step == 4
    manifest = tmp_path / "step-9" / folders.STATE_FILE
    assert f"{manifest} is of step 2, but the name of its folder is of step 9" in logged.text
    with pytest.raises(CheckpointError, match="step 9, which was requested, is damaged"):
        manager(tmp_path, load_step=9).find()
    with pytest.raises(UserError, match="is of step 2"):
        manager(tmp_path / "new", initial_load_path=str(tmp_path / "step-9")).find()
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    assert folders.delete_old(tmp_path, 2) == [], "a copy pushes no good one out"
    assert folders.delete_old(tmp_path, 1) == [2]
    assert sorted(os.listdir(tmp_path)) == ["new", "step-4", "step-9"]


def test_a_damaged_one_of_ours_is_not_taken_for_a_foreign_one(tmp_path):
    """Foreign folders are not verified; a manifest that is damaged must not make one of ours such a folder."""
    newest = save(tmp_path, 8)
    (newest / "train_state.json").write_text("{")
    with pytest.raises(UserError, match=r"train_state\.json is damaged"):
        manager(tmp_path / "new", initial_load_path=str(newest)).find()


def test_a_renamed_save_is_not_finished_under_another_step(tmp_path):
    save(tmp_path, 2).rename(tmp_path / ".step-9.saving")
    assert folders.clean_up(tmp_path) == [".step-9.saving: removed"]
    assert os.listdir(tmp_path) == []


def test_a_copy_under_a_name_of_the_users_own_can_be_started_from(tmp_path):
    shutil.copytree(save(tmp_path, 2), tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    for name in ("base", "link"):
        assert manager(tmp_path / "new", initial_load_path=str(tmp_path / name)).find().step == 2


def test_the_one_just_saved_stays_whatever_the_names_say(tmp_path):
    """A run that went on from further back (`load_step`) saves below the newest names."""
    for step in (4, 100, 200, 300):
        save(tmp_path, step)
    assert folders.delete_old(tmp_path, 2, saved=4) == [100]
    assert sorted(os.listdir(tmp_path)) == ["step-200", "step-300", "step-4"]


@pytest.mark.parametrize("extra", ["__1_0.distcp", "a.distcp", ".metadata", "plan.json", "\n.distcp"])
def test_what_a_load_might_read_is_listed_or_refused(tmp_path, extra):
    save(tmp_path, 3)
    newest = save(tmp_path, 8)
    if extra == ".metadata":
        listed = json.loads((newest / folders.STATE_FILE).read_text())["files"]
        del listed[extra]
        reseal(newest, files=listed)
        expected = "does not list .metadata"
    else:
        (newest / extra).write_bytes(b"x")
        expected = "is not listed in train_state.json"
    assert manager(tmp_path).find().step == 3
    (reason,) = folders.damaged_in(tmp_path)
    assert expected in reason
    assert reason.isprintable()


@pytest.mark.parametrize("extra", ["notes.txt", ".nfs0000123", ".DS_Store"])
def test_what_no_load_reads_may_lie_there(tmp_path, extra):
    (save(tmp_path, 8) / extra).write_text("mine")
    assert manager(tmp_path).find().step == 8


FACTS = {"size": 70, "sha256": "0" * 64}
CANNOT_BE = {
    "folder": ["..", "/", "/etc", "a/b", "../step-3", "", None, 3, "0" * 31, "0" * 32 + "\n", "\u0663" * 32, ...],
    "step": [-1, 8.0, "8", True, None, [8], ...],
    "contents": ["model", None, [1], {"model": 1}, ...],
    "files": [
        *([], None, {}, {".metadata": None}, {".metadata": {}}, {".metadata": {**FACTS, "more": 1}}, ...),
        *({".metadata": {**FACTS, "size": size}} for size in (-1, 1.5, "70", True, None)),
        *({".metadata": {**FACTS, "sha256": digest}} for digest in ("", "0" * 63, "G" * 64, 7, None)),
        *({".metadata": FACTS, name: FACTS} for name in ("../a", "/etc/passwd", "", ".", "..", "a\0b")),
        {".metadata": FACTS, "train_state.json": FACTS},
    ],
    "extra": [None, [], "x", ...],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CANNOT_BE.items() for value in values])
def test_a_manifest_that_fits_its_hash_and_cannot_be(tmp_path, key, value):
    newest = save(tmp_path, 8)
    reseal(newest, **{key: value})
    with pytest.raises(InvalidCheckpoint, match="is not a valid manifest of a checkpoint") as caught:
        folders.read_checkpoint(newest)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(newest))
    with pytest.raises(CheckpointError) as ended:
        manager(tmp_path).find()
    assert ended.value.exit_code == EXIT_NO_GOOD_CHECKPOINT


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"null", b"7", b"[" * 200_000, b'{"a":' * 200_000, b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": "\\u001b[31m\\n"}', b'{"format": ' + b'"x"'.ljust(100_000, b" ") + b"}", b"\0" * 100,
    ],
)  # fmt: skip
def test_a_manifest_of_any_bytes_is_reported_in_a_line(tmp_path, content):
    (save(tmp_path, 8) / folders.STATE_FILE).write_bytes(content)
    (reason,) = folders.damaged_in(tmp_path)
    assert reason.isprintable()
    assert len(reason) < 500 + len(str(tmp_path))


def test_a_token_folder_that_is_a_link_is_not_followed(tmp_path):
    """A copy of an object store's checkpoint has one; a link in its place may lead anywhere."""
    newest, outside = save(tmp_path / "here", 8), tmp_path / "outside"
    (newest / ("a" * 32)).mkdir()
    for name in ("__0_0.distcp", ".metadata"):
        (newest / name).rename(newest / ("a" * 32) / name)
    reseal(newest, folder="a" * 32)
    assert folders.read_checkpoint(newest).location == str(newest / ("a" * 32))
    (newest / ("a" * 32)).rename(outside)
    (newest / ("a" * 32)).symlink_to(outside)
    with pytest.raises(InvalidCheckpoint, match="is not a folder"):
        folders.read_checkpoint(newest)


def test_what_vanishes_while_it_is_looked_at_is_no_damage(tmp_path, monkeypatch):
    """Another run deletes its old ones while a reader lists them."""
    for step in (3, 8):
        save(tmp_path, step)
    real = folders.read_checkpoint

    def read(path):
        if str(path).endswith("step-3"):
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(folders, "read_checkpoint", read)
    whole, damaged = folders.list_checkpoints(tmp_path)
    assert ([found.step for found in whole], damaged) == ([8], [])


def test_what_cannot_be_removed_is_reported_and_blocks_nothing(tmp_path, logged, monkeypatch):
    save(tmp_path, 3)
    (tmp_path / ".step-9.saving").mkdir()
    (tmp_path / ".step-7.deleting").mkdir()

    def busy(path, *rest, **keys):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert manager(tmp_path).find().step == 3
    for name in (".step-9.saving", ".step-7.deleting"):
        assert f"{name}: could not be removed (Device or resource busy)" in logged.text


STAGES = (("tok_embeddings.weight", "layers.0.w"), ("layers.1.w", "norm.weight", "output.weight"))


def read_as_a_stage(place: str, lacking: str) -> list[float] | str:
    from torch import distributed as dist

    from quadriga.checkpoint.load import load_tensors

    rank = dist.get_rank()
    own = {f"model.{name}": torch.zeros(4) for name in STAGES[rank]}
    if lacking and rank == 1:
        own[f"model.{lacking}"] = torch.zeros(4)
    try:
        load_tensors(
            place, own, dist.new_group(backend="gloo"), may_hold_more=True, prefix="model.", optional="random."
        )
    except UserError as error:
        return str(error)
    return [value.sum().item() for value in own.values()]


def test_stages_of_a_pipeline_read_a_folder_whose_names_have_no_prefix_in_common(tmp_path):
    from torch.distributed import checkpoint as dcp

    saved = {name: torch.ones(4) for stage in STAGES for name in (*stage, "of.no.use")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=tmp_path / "dcp")
    assert run_ranks(read_as_a_stage, 2, str(tmp_path / "dcp"), "") == [[4.0] * 2, [4.0] * 3]
    first, second = run_ranks(read_as_a_stage, 2, str(tmp_path / "dcp"), "layers.2.w")
    assert first == second
    assert "the checkpoint lacks layers.2.w" in first
