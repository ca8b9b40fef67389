"""`quadriga checkpoints`: lists, verifies, and says so by its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchtitan_checkpoints import run_folder

from quadriga.checkpoint import folder as folders
from quadriga.cli.main import main


def save(place, step):
    folders.prepare(place, step)
    Path(folders.staging_path(place, step), "__0_0.distcp").write_bytes(b"tensors" * 99)
    Path(folders.staging_path(place, step), ".metadata").write_bytes(b"a plan.")
    extra = {"train_state": {"tokens_seen": 1000 * step}, "world_size": 4}
    return Path(folders.publish(place, step, ("model", "optimizer"), extra))


def test_lists_and_verifies(tmp_path, capsys):
    place = tmp_path / "checkpoint"
    first, second = save(place, 3), save(place, 7)
    assert main(["checkpoints", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{first}: model, optimizer; 700 B; sizes are correct; 3,000 tokens seen; saved on 4 ranks" in out
    assert main(["checkpoints", str(place), "--verify"]) == 0
    assert capsys.readouterr().out.count("verified") == 2

    (second / "__0_0.distcp").write_bytes(b"Tensors" * 99)
    (place / ".step-9.saving").mkdir()
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"DAMAGED: {second / '__0_0.distcp'} is damaged" in out
    assert ".step-9.saving: not completed" in out
    (first / "train_state.json").unlink()
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 3


def test_those_of_torchtitan_are_listed_as_such(tmp_path, capsys):
    run_folder("one_rank", tmp_path)
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    whole, last = capsys.readouterr().out.splitlines()
    assert whole.endswith("step-3: model, optimizer; saved by torchtitan, without hashes to verify")
    assert last.endswith("step-6: model; saved by torchtitan, without hashes to verify")
    for step in (3, 6):
        (tmp_path / f"checkpoint/step-{step}/__0_0.distcp").unlink()
    assert main(["checkpoints", str(tmp_path)]) == 3
    assert capsys.readouterr().out.count("DAMAGED") == 2


def test_says_where_there_is_none(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert "no checkpoint" in capsys.readouterr().out


def test_a_folder_that_does_not_exist_is_a_mistake(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "step-1").write_text("")
    assert main(["checkpoints", str(tmp_path / "step-1")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_that_leads_nowhere_is_no_folder(tmp_path, capsys, target):
    (tmp_path / "link").symlink_to(target)
    assert main(["checkpoints", str(tmp_path / "link")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "/dev/zero", "a\0b"])
def test_what_is_no_folder_has_no_list(place, capsys):
    assert main(["checkpoints", place]) == 2
    assert "folder" in capsys.readouterr().err


def test_a_conversion_takes_no_run_at_random(tmp_path, capsys):
    save(tmp_path / "a" / "x", 3)
    save(tmp_path / "b", 7)
    save(tmp_path / "c", 9)
    assert main(["convert", "to-hf", str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "several of its folders have checkpoints" in said
    assert f"{tmp_path}/b/step-7, {tmp_path}/c/step-9" in said


def test_a_conversion_needs_two_names(capsys):
    """An empty one is the current directory, which nobody should be told to remove."""
    for argv in (["from-hf", "x", ""], ["to-hf", "", "x"]):
        assert main(["convert", *argv]) == 2
        assert "SOURCE, OUT\n    is empty" in capsys.readouterr().err
