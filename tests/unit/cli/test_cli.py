"""The commands: results on standard output, reports and progress on standard error, exit codes."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quadriga import __version__
from quadriga.cli.main import COMMANDS, main
from quadriga.config.card import CardTarget, read_target

TOML = """
[job]
description = "A small one"
dump_folder = "out/small"
[training]
steps = 12
seq_len = 64
local_batch_size = 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(TOML)
    return tmp_path


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert all(f"  {name} " in printed.out for name in COMMANDS)
    assert printed.err == ""


@pytest.mark.parametrize("argv", [["version"], ["--version"]])
def test_version(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "version"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: quadriga {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["kard"], "did you mean: card"),
        (["card"], "the following arguments are required: FILE"),
        (["card", "small.toml"], "there is no card yet"),
        (["card", "small.toml", "--ngpu", "0"], "0 is not a number of ranks"),
        (["card", "small.toml", "--ngpu", "2", "--device", "H1000"], "did you mean: h100-80gb"),
        (["card", "none.toml", "--ngpu", "2"], "no such file"),
        (["schema", "--indent"], "unrecognized arguments: --indent"),
        (["keys", "chekpoint"], "no key has this in its name or meaning"),
        (["dry-run", "small.toml", "--training.steps", "0"], "out of range"),
        (["dry-run", "small.toml", "--ngpu", "x"], "x is not a number of ranks"),
    ],
)
def test_mistakes_are_reported_with_exit_code_2(argv, says, folder, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("quadriga: ")
    assert printed.out == ""


@pytest.mark.parametrize(
    "command", [["compare", "o" * 299], ["goodput"], ["trace"], ["checkpoints"], ["card"], ["dry-run"]]
)
def test_a_path_that_no_file_system_can_have_is_reported(command, capsys):
    assert main([*command, "o" * 300]) == 2
    output = capsys.readouterr().err
    assert "o" * 299 in output
    assert len(output) < 1500


def test_a_file_system_that_fails_is_no_mistake_of_the_user(monkeypatch, capsys):
    def fails(argv):
        raise OSError(errno.EIO, "Input/output error", "a/metrics.jsonl")

    monkeypatch.setattr("quadriga.cli.goodput.main", fails)
    assert main(["goodput", "a"]) == 1
    assert "a/metrics.jsonl\n    cannot be used: Input/output error" in capsys.readouterr().err


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["training"]


def test_keys_explains_a_table(capsys):
    assert main(["keys", "lr_scheduler"]) == 0
    printed = capsys.readouterr().out
    assert "--lr_scheduler.warmup_steps" in printed
    assert "Steps of the linear warm-up, " in printed


def test_a_card_is_written_checked_and_found_stale(folder, capsys):
    assert main(["card", "small.toml", "--check", "--ngpu", "2"]) == 1
    assert "README.md: missing" in capsys.readouterr().err
    assert main(["card", "small.toml", "--ngpu", "2", "--device", "A100"]) == 0
    assert main(["card", "small.toml", "--check"]) == 0  # for 2 GPUs, as its first line says
    (folder / "small.toml").write_text(TOML.replace("12", "13"))
    capsys.readouterr()
    assert main(["card", "small.toml", "--check"]) == 1
    assert "README.md: out of date" in capsys.readouterr().err
    assert main(["card", "small.toml"]) == 0
    assert main(["card", "small.toml", "--check"]) == 0
    text = (folder / "README.md").read_text()
    assert read_target(text) == CardTarget("small.toml", 2, "A100")
    assert "13 steps" in text


def test_a_card_can_be_printed(folder, capsys):
    assert main(["card", "small.toml", "--ngpu", "1", "--print"]) == 0
    assert capsys.readouterr().out.startswith("<!-- quadriga card small.toml --ngpu 1 -->")
    assert not (folder / "README.md").exists()


def test_a_stale_page_is_found(root, tmp_path):
    """`docs --check` in a copy of what it reads, with one word of the page changed."""
    for name in ("quadriga", "configs", "docs"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "run_train.sh", tmp_path)
    page = tmp_path / "docs" / "configuration.md"
    page.write_text(page.read_text().replace("Strict", "Lenient"))
    check = [sys.executable, "-m", "quadriga.cli", "docs"]
    done = subprocess.run([*check, "--check"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "configuration.md: out of date" in done.stderr
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert page.read_text() == (root / "docs" / "configuration.md").read_text()


def test_a_dry_run_prints_the_run(folder, capsys):
    assert main(["dry-run", "small.toml", "--ngpu", "2", "--training.steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "7 steps" in printed
    assert "2 ranks" in printed


def test_output_to_a_reader_that_has_gone_is_no_fault(root):
    command = f"{sys.executable} -m quadriga.cli keys | head -1"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["compare", "x", "y"], "there is no such folder"),
        (["card", "x", "--ngpu", "2"], "cannot be read"),
        (["compare", "x", "y", "--warmup", "\u0663"], "is not a number of steps"),
        (["trace", "x", "--step", "\u0663"], "is not the number of an iteration"),
        (["trace", "x", "--step=-5"], "is not the number of an iteration"),
        (["ccl-bench", "write", "x", "y", "--scale-out-gbps", "nan"], "is not a bandwidth"),
    ],
)
def test_loops_of_links_and_odd_digits_are_mistakes(folder, argv, says, capsys):
    (folder / "x").symlink_to("x")
    assert main(argv) == 2
    assert says in capsys.readouterr().err
