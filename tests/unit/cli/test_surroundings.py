"""Commands whose output, locale, directory or folders are not as usual: one message, and no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quadriga.cli.main import main
from quadriga.cli.search import SearchProgress

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def shell(command: str, root: Path, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    python = f"{sys.executable} -m quadriga.cli"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command.replace('QUADRIGA', python)}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), **environ},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize("command", ["QUADRIGA keys", "QUADRIGA help", "QUADRIGA schema"])
def test_a_full_disk_of_the_output_is_one_message(command, root, tmp_path):
    done = shell(f"{command} > /dev/full", root, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "quadriga: 1 problem\n\nthe output\n    cannot be written: No space left on device\n"


def test_a_reader_that_has_gone_and_a_closed_output_are_no_faults(root, tmp_path):
    for command in ("QUADRIGA keys | head -1", "QUADRIGA help | true", "QUADRIGA keys >&-"):
        done = shell(command, root, tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_locale_without_the_characters_of_a_file_escapes_them(root, tmp_path):
    (tmp_path / "small.toml").write_text('[job]\ndescription = "caf\u00e9"\n', encoding="utf-8")
    done = shell("QUADRIGA card small.toml --ngpu 1 --print", root, tmp_path, **ASCII)
    assert done.returncode == 0
    assert "caf\\xe9" in done.stdout


def test_a_locale_without_the_characters_of_a_folder_is_named(root, tmp_path):
    (tmp_path / "small.toml").write_text('[job]\ndump_folder = "\u00e9"\n', encoding="utf-8")
    done = shell("QUADRIGA dry-run small.toml --ngpu 1", root, tmp_path, **ASCII)
    assert done.returncode == 2
    assert "names of files cannot be written in this locale (ascii)" in done.stderr


def test_a_current_directory_that_was_removed_is_named(root, tmp_path):
    there = tmp_path / "gone"
    there.mkdir()
    command = f"rmdir {there}; QUADRIGA dry-run {root}/configs/debug/debug.toml --ngpu 1"
    done = shell(command, root, there)
    assert done.returncode == 2
    assert "the current directory\n    was removed" in done.stderr


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("quadriga.cli.keys.main", interrupted)
    assert main(["keys"]) == 130
    assert capsys.readouterr().err == "quadriga: interrupted\n"


def test_the_place_of_a_result_is_checked_before_the_work(tmp_path, root, capsys):
    search = ["search", str(root / "configs/debug/debug.toml"), "--ngpu", "1", "--device", "h100-80gb", "--write"]
    assert main([*search, str(tmp_path / "none" / "x.toml")]) == 2
    assert capsys.readouterr().out == ""
    assert main([*search, "/dev/full"]) == 1
    assert "/dev/full cannot be written: No space left" in capsys.readouterr().err
    assert main([*search, str(tmp_path / "a b\x1b[2J.toml")]) == 0
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert f"quadriga train '{tmp_path}/a b\\x1b[2J.toml' --ngpu 1" in said


@pytest.mark.parametrize("mine", ["# My notes\n", "<!-- quadriga card other.toml --ngpu 2 -->\n"])
def test_a_card_replaces_no_other_text(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text("[training]\nsteps = 3\n")
    (tmp_path / "README.md").write_text(mine)
    for more in ([], ["--check"]):
        assert main(["card", "small.toml", "--ngpu", "1", *more]) == 2
        assert (tmp_path / "README.md").read_text() == mine
    assert "print the card instead: --print" in capsys.readouterr().err
    assert main(["card", "small.toml", "--ngpu", "1", "--print"]) == 0


def test_the_remedy_of_a_missing_card_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.toml").write_text("[training]\nsteps = 3\n")
    assert main(["card", "a b.toml", "--ngpu", "2", "--check"]) == 1
    assert "write it with `quadriga card 'a b.toml' --ngpu 2`" in capsys.readouterr().err


def test_names_of_checkpoints_are_printed_escaped(tmp_path, capsys):
    folder = tmp_path / "a\x1b[2J"
    (folder / "checkpoint" / "step-3").mkdir(parents=True)
    main(["checkpoints", str(folder)])
    assert "\x1b" not in capsys.readouterr().out


def test_a_long_search_says_how_far_it_is(capsys):
    progress = SearchProgress(seconds=0.0)
    progress(1234, 5)
    assert capsys.readouterr().err == "1,234 candidates so far, 5 of them fit\n"
    SearchProgress()(1, 0)
    assert capsys.readouterr().err == ""


def test_numbers_of_a_card_that_json_lacks_are_text(tmp_path, capsys):
    (tmp_path / "card.yaml").write_text("version: .inf\nworkload: {data: {seq_len: .nan, batch_size: [-.inf]}}\n")
    assert main(["ccl-bench", "read", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"(?<!\")(NaN|Infinity)", printed)
    assert json.loads(printed)["card"]["version"] == "inf"


def test_the_launcher_reports_a_full_disk_of_the_output(root, tmp_path):
    dry_run = f"{root}/run_train.sh --job.dump_folder {tmp_path}"
    done = shell(f"{dry_run} > /dev/full", root, tmp_path, DRY_RUN="1", PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr == "quadriga: 1 problem\n\nthe output\n    cannot be written: No space left on device\n"


def test_the_launcher_escapes_or_names_what_the_locale_does_not_have(root, tmp_path):
    (tmp_path / "small.toml").write_text('[job]\ndescription = "caf\u00e9"\n', encoding="utf-8")
    ascii_run = {**ASCII, "DRY_RUN": "1", "PYTHON": sys.executable, "CONFIG_FILE": "small.toml"}
    done = shell(f"{root}/run_train.sh", root, tmp_path, **ascii_run)
    assert done.returncode == 0
    assert "caf\\xe9" in done.stdout
    (tmp_path / "small.toml").write_text('[job]\ndump_folder = "\u00e9"\n', encoding="utf-8")
    done = shell(f"{root}/run_train.sh", root, tmp_path, **ascii_run)
    assert done.returncode == 2
    assert "names of files cannot be written in this locale (ascii)" in done.stderr


def test_a_run_whose_output_is_full_ends_well(root, tmp_path):
    run = f"{root}/run_train.sh --job.dump_folder {tmp_path}/run --training.steps 1 --model.n_layers 1"
    done = shell(
        f"{run} > /dev/full", root, tmp_path, NGPU="1", OMP_NUM_THREADS="1", COMM_BACKEND="gloo", PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stderr
    assert "the summary cannot be written to the standard output: No space left on device" in done.stderr
