"""What README and docs show can be typed, and what they say is printed is printed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ROOT, launch, wait_until

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_launch_of_the_pages_names_one_file_and_keys(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("quadriga.launch.supervisor.main", lambda argv, environ: started.append(argv) or 0)
    code = code_of(page).replace("\\\n", " ")
    for line in re.findall(r"(?m)^quadriga ((?:train|dry-run) .*)", code):
        words = shlex.split(line, comments=True)
        if words[1:] and not set("[<&|>") & set("".join(words)):
            assert main(words) == 0, line
            assert started.pop().count("--job.config_file") == 1, line


def test_a_file_can_be_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torchtitan."""
    started: list[list[str]] = []
    monkeypatch.setattr("quadriga.launch.supervisor.main", lambda argv, environ: started.append(argv) or 0)
    assert main(["train", "--job.config_file", "run.toml", "--checkpoint.enable"]) == 0
    assert started == [["--job.config_file", "run.toml", "--checkpoint.enable"]]


def test_make_train_starts_the_debug_configuration_on_four_ranks() -> None:
    def line(*given: str) -> str:
        command = ["make", "--dry-run", "--no-print-directory", "train", *given]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
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


SLURM_STUBS = {
    "run_train.sh": "#!/bin/bash\ntrap 'sleep 0.2; exit 75' USR1 TERM\ntouch started\n"
    '[ -n "$FINISHED" ] && exit 0\nwhile :; do sleep 0.05; done\n',
    "scontrol": '#!/bin/bash\necho "$@" > requeued\n',
}


def is_caught(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as the kernel lists it."""
    mask = re.search(r"(?m)^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 75, "requeue 7\n"), (signal.SIGTERM, 75, "requeue 7\n"), (None, 0, None)],
    ids=["SIGUSR1", "SIGTERM", "finished"],
)
def test_the_slurm_script_requeues_a_run_that_was_stopped(
    number: signal.Signals | None, code: int, requeued: str | None, tmp_path: Path
) -> None:
    """The script of the page, with a run and a scheduler of a few lines."""
    script = OPERATIONS.partition("### Slurm")[2].partition("```bash\n")[2].partition("```")[0]
    (tmp_path / "job.sh").write_text(script)
    for name, text in SLURM_STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "FINISHED": "" if number else "1"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environ, start_new_session=True)
    try:
        assert wait_until((tmp_path / "started").exists, 60)
        if number:
            assert wait_until(lambda: is_caught(job.pid, signal.SIGTERM), 60)  # the last trap of the script
            job.send_signal(number)
        assert job.wait(60) == code
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    found = tmp_path / "requeued"
    assert (found.read_text() if found.exists() else None) == requeued


def test_an_older_python_is_refused_with_the_version_that_is_needed() -> None:
    code = "import runpy, sys; sys.version_info = (3, 10); runpy.run_module('quadriga.launch', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("quadriga: Python 3.11 or newer is needed; ")
