"""What README and docs show can be typed, and what they say is printed is printed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, launch

from quadriga import errors
from quadriga.cli.main import COMMANDS, main
from quadriga.config.keys import KEYS
from quadriga.hardware import DEVICES, device_named

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


OF_GLOO = {"Connection closed by peer", "Timed out waiting"}
COMPOSED = {  # of the messages that are put together, the part that stands in one text
    "this run folder is in use by process": "this run folder is in use by ",
    "is not listed in train_state.json": " is not listed in ",
    "random generators that are not in the checkpoint start anew": "that are not in the checkpoint start anew",
    "random generators of the checkpoint that this run does not use": "of the checkpoint that this run does not use",
    "the loss is nan": ": the loss is ",
}


def code_of(page: Path) -> str:
    """The blocks of code of a page, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    indented = re.findall(r"(?m)^    (?:quadriga|python|torchrun|\./).*", text)
    return "\n".join([*blocks, *inline, *indented])


def block_after(text: str, line: str) -> str:
    """The rest of the block of code in which a line stands."""
    return text[text.index(line) + len(line) :].partition("\n")[2].partition("\n```")[0]


def first_column(text: str, heading: str) -> list[str]:
    rows = [line for line in text.partition(heading)[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [row.split("|")[1].strip() for row in rows[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_keys_of_the_readme_exist(page: Path) -> None:
    code = code_of(page)
    keys = {key.replace(".no_", ".") for key in re.findall(r"--((?:\w+\.)+\w+)", code)}
    assert keys - {"section.key", "table.key"} <= KEYS.keys()
    files = re.findall(
        r"(?:^|[\s`\"'=/])((?:configs|benchmarks|scripts|tests|torchtitan)/[\w./]*\w\.(?:py|toml|json))", code
    )
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    named = re.findall(r"(?m)(?:^|\$ )(?:\w+=\S+ )*(?:quadriga|python -m quadriga\.cli) ([a-z][\w-]*)", code_of(page))
    assert set(named) <= COMMANDS.keys()


def test_make_has_the_targets_of_the_pages() -> None:
    rules = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
    named = {target for page in PAGES for target in re.findall(r"\bmake ([a-z-]+)\b", code_of(page))}
    assert {"train", "test", "kill-matrix"} <= named
    assert named <= set(rules)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_train_starts_the_debug_configuration_on_four_ranks() -> None:
    def line(*given: str) -> str:
        command = ["make", "--dry-run", "train", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert line().startswith("NGPU=4 ")
    assert line().endswith('.venv/bin/python" ./run_train.sh --training.steps 50')
    assert line("STEPS=200").endswith("--training.steps 200")
    assert 'CONFIG_FILE="${CONFIG_FILE:-$repo/configs/debug/debug.toml}"' in (ROOT / "run_train.sh").read_text()


@pytest.mark.parametrize("command", [["./run_train.sh"], [sys.executable, "torchtitan/train.py"]], ids=["sh", "py"])
def test_torchtitan_train_runs_from_any_directory(command: list[str], tmp_path: Path) -> None:
    """Without installing the package: nothing but the file that is named leads to it."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHON": sys.executable}
    command = [*command[:-1], str(ROOT / command[-1]), "--training.stepps", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean: training.steps" in done.stderr


def test_the_report_of_the_readme_is_printed(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        '[training]\nseq_len = "2k"\n\n[compile]\nenabled = true\n\n[activation_checkpoint]\nmode = "ful"\n'
    )
    ended = launch([str(ROOT / "run_train.sh")], {"CONFIG_FILE": "my.toml"}, cwd=tmp_path)
    assert ended.code == 2
    assert ended.err.strip() == block_after(README, "$ CONFIG_FILE=my.toml ./run_train.sh").strip()


def test_the_estimate_of_the_readme_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """The README shortens it."""
    monkeypatch.chdir(ROOT)
    command = re.search(r"(?m)^\$ quadriga (estimate [^#\n]*)", README)
    assert command is not None
    assert main(command[1].split()) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    shown = [" ".join(line.split()) for line in block_after(README, command[0]).splitlines() if line.strip()]
    assert len(shown) >= 6
    assert not [line for line in shown if not any(line in one for one in printed)]


def test_the_devices_of_the_page_are_those_of_the_table() -> None:
    text = (ROOT / "docs/estimates.md").read_text(encoding="utf-8").partition("The known devices are ")[2]
    named = re.split(r", | and ", " ".join(text.partition(". `quadriga/hardware.py`")[0].split()))
    found = [device_named(name, "") for name in named]
    assert sorted(device.name for device in found if device) == sorted(device.name for device in DEVICES)


def test_the_exit_codes_of_the_page_are_those_of_the_code() -> None:
    codes = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert set(first_column(OPERATIONS, "## Exit codes")) == codes | {"128 + n"}


def test_the_messages_of_the_page_are_in_the_code() -> None:
    """The longest part of each message that holds no place for a value stands in a text of the package."""
    texts = "\n".join(
        node.value
        for path in (ROOT / "quadriga").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    missing = []
    for cell in first_column(OPERATIONS, "## Messages"):
        for message in re.findall(r"`([^`]+)`", cell):
            parts = re.split(r"\.\.\.|\b[A-Z]{3,}(?:/[\w-]+)*\b|\b[A-Z]\b|[=:;,()]", message)
            longest = max((part.strip() for part in parts), key=len)
            if COMPOSED.get(longest, longest) not in texts and longest not in OF_GLOO:
                missing.append((message, longest))
    assert not missing
