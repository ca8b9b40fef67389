"""docs/architecture.md lists the files that a reader opens to follow one thing. A trace of the real journey decides."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import journeys
import pytest
from launching import RUN_TRAIN, launch, replace_loop
from ranks import run_ranks
from training import DEBUG_FILE, TINY, one_rank
from tree import PACKAGE, ROOT

TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PAGE = TEXT.partition("\n## Five paths through the code\n")[2].partition("\n## ")[0]
ITEM = re.compile(r"(?m)^\d+\. \[`[^`]+`\]\(\.\./([^)]+)\): \S")
ROW = re.compile(r"(?m)^\| ([^|]+) \| (\d+) \| (\d+) \|$")
KNOB = re.compile(r"(?<![a-z])loss_chunks\b")  # the key and its one name, also in `training__loss_chunks`
HOOK = """
import pathlib
sys.path.append({folder!r})
import journeys
journeys.Trace(journeys.LAUNCH, pathlib.Path({log!r})).start()
"""

# Files per journey today, which may only fall, and the goal. Keys are the headings of the page.
LIMITS = {
    "One key: `training.loss_chunks`": (6, 7),
    "One document, disk to batch": (10, 7),
    "One weight, initialization to checkpoint to Hugging Face": (11, 11),
    "One loss, logits to log line": (6, 6),
    "One launch, `run_train.sh` to a rank": (7, 7),
}

# Files that a journey enters and a reader need not open.
EXCLUDED = {
    "quadriga/units.py": "formats numbers with their units, and names",
    "quadriga/log.py": "adds the prefix to a log line",
    "quadriga/reading.py": "opens files with a limit on their size",
    "quadriga/config/model_spec.py": "the sizes of a model, one property",
    "quadriga/checkpoint/ranks.py": "calls a function, and raises the error of any rank on all ranks",
}


@pytest.fixture(scope="module")
def entered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The files of the traced journeys, in the order of first entry, without the excluded ones."""
    folder = tmp_path_factory.mktemp("journeys")
    assert run_ranks(traced_training, 1, folder, backend=None) == [0]
    variables = replace_loop(folder / "hook", "def run(run, environ):\n    return 0\n")
    hook = HOOK.format(folder=str(Path(journeys.__file__).parent), log=str(folder / "log"))
    with (folder / "hook/sitecustomize.py").open("a") as sitecustomize:
        sitecustomize.write(hook)
    launched = launch([*RUN_TRAIN, "--job.dump_folder", str(folder / "launched")], {**variables, "NGPU": "1"})
    assert launched.code == 0, launched.err
    found: dict[str, list[str]] = {"launch": ["run_train.sh"]}
    for line in dict.fromkeys((folder / "log").read_text().splitlines()):
        journey, file = line.split()
        found.setdefault(journey, []).append(file)
    assert set(EXCLUDED) <= {file for files in found.values() for file in files}
    return {journey: [file for file in files if file not in EXCLUDED] for journey, files in found.items()}


def traced_training(folder: Path) -> int:
    """One step of a tiny model on JSONL documents, a checkpoint, and its export. On a forked rank."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"text": "One document of a few words."}\n' * 100)
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder / "run"), *TINY]
    argv += ["--training.dataset=jsonl", f"--training.dataset_path={corpus}", "--checkpoint.last_save_in_hf"]
    argv += ["--training.steps=1", "--lr_scheduler.warmup_steps=1"]
    journeys.Trace(journeys.TRAINING, folder / "log").start()
    try:
        return one_rank(argv)
    finally:
        sys.setprofile(None)


def listed(heading: str) -> list[str]:
    """The files that the page lists under a heading."""
    return ITEM.findall(PAGE.partition(f"\n### {heading}\n")[2].partition("\n### ")[0])


def test_one_knob():
    files = {path for kind in ("*.py", "*.toml") for path in PACKAGE.rglob(kind)}
    found = [str(path.relative_to(ROOT)) for path in files if KNOB.search(path.read_text(encoding="utf-8"))]
    assert sorted(listed("One key: `training.loss_chunks`")) == sorted(found)


def test_one_document(entered):
    assert listed("One document, disk to batch") == entered["document"]


def test_one_weight(entered):
    assert listed("One weight, initialization to checkpoint to Hugging Face") == entered["weight"]


def test_one_loss(entered):
    assert listed("One loss, logits to log line") == entered["loss"]


def test_one_launch(entered):
    assert listed("One launch, `run_train.sh` to a rank") == entered["launch"]


def test_no_journey_grows():
    rows = {heading: (int(count), int(goal)) for heading, count, goal in ROW.findall(PAGE)}
    assert rows == {heading: (len(listed(heading)), goal) for heading, (_, goal) in LIMITS.items()}
    assert all(count <= LIMITS[heading][0] for heading, (count, _) in rows.items())
    assert len(EXCLUDED) <= 5
