"""The commands of docs/tutorial.md run in order, with a smaller model on two ranks. What needs GPUs is a dry run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import ROOT, launch

TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
FOR_GPUS = ("## Train on one machine with GPUs", "## Train on a cluster")
NOT_RUN = (
    "source ",
    "pip install ",
    "python scripts/download_hf_assets.py",
    "torchrun ",
)  # these need a network or GPUs
SMALLER = {
    "debug": {
        'flavor = "debugmodel"': 'flavor = "debugmodel"\nn_layers = 2',
        "seq_len = 256": "seq_len = 32",
        "global_batch_size = 16": "global_batch_size = 8",
    },
    "llama3_8b": {'"./assets/hf/Llama-3.1-8B"': '"builtin:bytes"', 'dataset = "c4"': 'dataset = "builtin"'},
}
QUADRIGA = 'quadriga() { "$PYTHON" -m quadriga.cli "$@"; }\npython() { "$PYTHON" "$@"; }\n'


def commands(markdown: str) -> list[str]:
    """The commands of the blocks of bash in a text. A here-document belongs to its command."""
    blocks = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```", markdown))
    found: list[str] = []
    for line in blocks.splitlines():
        heredoc = re.search(r"<<'(\w+)'", found[-1]) if found else None
        if heredoc and not found[-1].endswith(f"\n{heredoc[1]}"):
            found[-1] += f"\n{line}"
        elif line:
            found.append(line)
    return found


def sections(markdown: str) -> list[str]:
    return re.split(r"(?m)^(?=## )", markdown)


def as_typed(command: str) -> str:
    """What `make train` runs, without its set-up and on as many ranks as NGPU says; every other command as it is."""
    make = re.fullmatch(r"make train(?: STEPS=(\d+))?", command)
    return f"./run_train.sh --training.steps {make[1] or 50}" if make else command


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the commands use, in which the shipped configurations are smaller and need no download."""
    for name in ("run_train.sh", "quadriga", "docs", "scripts", "torchtitan"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, changes in SMALLER.items():
        text = (ROOT / f"configs/{name}/{name}.toml").read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "configs" / name).mkdir(parents=True)
        (tmp_path / f"configs/{name}/{name}.toml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.more
def test_the_commands_of_the_tutorial_run(checkout: Path) -> None:
    ran = 0
    environ = {"CONFIG_FILE": str(checkout / "configs/debug/debug.toml"), "NGPU": "2"}
    for section in sections(TUTORIAL):
        for command in commands(section):
            if not command.startswith(NOT_RUN):
                extra = {"DRY_RUN": "1"} if section.startswith(FOR_GPUS) else {}
                done = launch(["bash", "-c", QUADRIGA + as_typed(command)], environ | extra, checkout, timeout=1800)
                assert done.code == 0, f"{command}\n{done.out[-3000:]}\n{done.err[-3000:]}"
                ran += 1
    assert ran >= 20
    for run, step in (("debug", 100), ("short", 20), ("small", 20), ("texts", 20)):
        assert (checkout / "outputs" / run / "checkpoint" / f"step-{step}").is_dir(), run


def test_the_commands_for_gpus_are_those_of_these_sections() -> None:
    assert all(f"\n{heading}\n" in TUTORIAL for heading in FOR_GPUS)


def test_commands_are_read_with_their_documents() -> None:
    text = "```bash\na 1\ncat > f <<'EOF'\nx = 1\n\ny = 2\nEOF\nb\n```\nc\n```bash\nmake train\n```\n"
    assert commands(text) == ["a 1", "cat > f <<'EOF'\nx = 1\n\ny = 2\nEOF", "b", "make train"]
    assert as_typed("make train STEPS=7") == "./run_train.sh --training.steps 7"
