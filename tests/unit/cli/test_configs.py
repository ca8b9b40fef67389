"""`quadriga configs`: names, paths and copies of the shipped configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from quadriga.cli.configs import shipped_folder
from quadriga.cli.main import main


def test_every_shipped_configuration_is_listed_with_its_path(root, capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    files = list(root.glob("configs/*/*.toml"))
    assert len(files) >= 6
    assert all(str(file) in printed for file in files)


def test_a_checkout_ships_its_own_files(root):
    assert shipped_folder() == root / "configs"


def test_a_name_gives_a_path_alone(root, capsys):
    assert main(["configs", "llama3_8b"]) == 0
    assert capsys.readouterr().out == f"{root}/configs/llama3_8b/llama3_8b.toml\n"


def test_a_wrong_name_is_refused_with_the_nearest(capsys):
    assert main(["configs", "lama3_8b"]) == 2
    assert "did you mean: llama3_8b" in capsys.readouterr().err


def test_a_copy_is_made_once_and_overwrites_no_other_file(
    root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time, the files are equal
        assert main(["configs", "debug", "--copy", "mine"]) == 0
        assert capsys.readouterr().out == "mine/debug/debug.toml\n"
    assert sorted(path.name for path in Path("mine").rglob("*")) == ["README.md", "debug", "debug.toml"]
    assert Path("mine/debug/debug.toml").read_bytes() == (root / "configs/debug/debug.toml").read_bytes()
    Path("mine/debug/debug.toml").write_text("[training]\n")
    assert main(["configs", "--copy", "mine"]) == 2
    assert "a file exists and is different" in capsys.readouterr().err
    assert Path("mine/debug/debug.toml").read_text() == "[training]\n"
