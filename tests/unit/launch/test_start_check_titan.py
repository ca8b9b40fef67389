"""What the dry run says of a checkpoint of torchtitan is what a start says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from test_start_check import IDS, Case, dry_run, started, state, token_ids
from torchtitan_checkpoints import SIZES, run_folder
from training import DEBUG_FILE, TINY, one_rank

KEYS = (
    *TINY,
    *SIZES,
    *("--checkpoint.enable", "--training.steps=9", "--checkpoint.load_step=3", "--training.dataset=builtin"),
)
FROM = ("--checkpoint.load_step=-1", "--checkpoint.folder=new", "--checkpoint.initial_load_path=RUN/checkpoint/step-3")
LAST = (*FROM[:2], "--checkpoint.initial_load_path=RUN/checkpoint/step-6")
IN_ORDER = ("--training.dataloader.no_shuffle", "--training.dataloader.window_overlap=0")
NO_MOMENTS = "--checkpoint.exclude_from_loading=optimizer"
ALL = ("--checkpoint.no_initial_load_model_only",)


def cut(folder: Path) -> None:
    shard = next(folder.glob("checkpoint/step-6/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-500])


def without_values(folder: Path) -> None:
    for path in folder.glob("checkpoint/step-*/.metadata"):
        path.write_bytes(b"\x80\x04cposix\nsystem\n.")


def in_hugging_faces_form(folder: Path) -> None:
    for step in (3, 6):
        shutil.rmtree(folder / f"checkpoint/step-{step}")
    place = folder / "checkpoint/step-5"
    place.mkdir()
    (place / "model.safetensors.index.json").write_text("{}")


CASES = [
    Case("goes on", 0, "step 3, from RUN/checkpoint/step-3, which torchtitan saved"),
    Case("goes on, with shuffled data", 0, "the position in the data is not restored: it is a position in unshuffled"),
    Case("goes on in its data", 0, "which torchtitan saved run folder", IN_ORDER),
    Case(
        "goes on, with token files",
        0,
        "not restored: the training data are token files, in which torchtitan has no position",
        (*IDS, "--checkpoint.folder=checkpoint", *IN_ORDER),
        token_ids(1, 2, 3, 4),
    ),
    Case(
        "goes on without its place",
        0,
        "which torchtitan saved run folder",
        ("--checkpoint.exclude_from_loading=dataloader",),
    ),
    Case("weights alone", 2, "has only the weights", ("--checkpoint.load_step=-1",)),
    Case("weights alone without the optimizer", 2, "has only the weights", ("--checkpoint.load_step=-1", NO_MOMENTS)),
    Case("weights alone, but finished", 0, "finished", ("--checkpoint.load_step=-1", "--training.steps=6")),
    Case("a newest one that is cut", 0, "step 3, from", ("--checkpoint.load_step=-1",), cut),
    Case("none is good", 3, "no published checkpoint is good", ("--checkpoint.load_step=-1",), without_values),
    Case("in HF form", 3, "checkpoint.initial_load_in_hf", ("--checkpoint.load_step=-1",), in_hugging_faces_form),
    Case("a step that is not there", 2, "has no checkpoint of this step", ("--checkpoint.load_step=2",)),
    Case(
        "another model", 2, "another model: the checkpoint has 2 layers, width 16, vocabulary", ("--model.n_layers=3",)
    ),
    Case("another size", 2, "shapes differ", ("--model.ffn_dim=56",)),
    Case("its weights", 0, "step 0, from the weights of RUN/checkpoint/step-3, which torchtitan saved", FROM),
    Case("all of it", 0, "step 3, from RUN/checkpoint/step-3, which torchtitan saved", (*FROM, *ALL)),
    Case("the weights of its last save", 0, "step 0, from the weights of RUN/checkpoint/step-6", LAST),
    Case("all of its last save", 2, "has only the weights", (*LAST, *ALL)),
    Case("the weights of another model", 2, "shapes differ", (*FROM, "--model.ffn_dim=56")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_dry_run_says_what_a_start_says(case: Case, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder("one_rank", tmp_path / "run")
    if case.prepare is not None:
        case.prepare(folder)
    before = state(folder)
    given = [f"--job.dump_folder={folder}", *KEYS, *case.keys]
    argv = [key.replace("RUN", str(folder)) for key in given]
    code, shown = dry_run(argv, capsys)
    assert state(folder) == before
    assert code == case.code, shown
    assert case.says.replace("RUN", str(folder)) in " ".join(shown.split())
    assert ("Ready to train." in shown) == (code == 0)
    (start,) = run_ranks(started, 1, ["--job.config_file", DEBUG_FILE, *argv], backend=None)
    assert start[0] == code, start
    assert {name: one for name, one in state(folder).items() if name in before and "checkpoint/step-" in name} == {
        name: one for name, one in before.items() if "checkpoint/step-" in name
    }


def test_ours_beside_theirs_is_taken_when_it_is_newer(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder("one_rank", tmp_path / "run")
    shutil.rmtree(folder / "checkpoint/step-6")
    argv = [f"--job.dump_folder={folder}", *KEYS, "--checkpoint.load_step=-1", "--training.steps=4"]
    assert run_ranks(one_rank, 1, ["--job.config_file", DEBUG_FILE, *argv], backend=None, timeout=120) == [0]
    code, shown = dry_run([*argv, "--training.steps=5"], capsys)
    assert code == 0, shown
    assert f"step 4, from {folder}/checkpoint/step-4" in " ".join(shown.split())
    assert (folder / "checkpoint/step-3/.metadata").exists()
