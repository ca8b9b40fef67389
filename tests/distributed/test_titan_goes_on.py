"""A run of torchtitan goes on here with its own next losses. What it trained there: `torchtitan_v022/losses.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torchtitan_checkpoints import SIZES, TORCHTITAN_FOLDER, run_folder
from training import train

IN_ORDER = "[training.dataloader]\nshuffle = false\nwindow_overlap = 0\n"
ON_TWO = {
    "one rank": (1, ()),
    "fsdp 2": (2, ("--training.local_batch_size=1",)),
    "tp 2": (2, ("--parallelism.tensor_parallel_degree=2",)),
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which both trainers start, with torchtitan's run in it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/assets").symlink_to(TORCHTITAN_FOLDER / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text((TORCHTITAN_FOLDER / "run.toml").read_text())
    (tmp_path / "in_order.toml").write_text((TORCHTITAN_FOLDER / "run.toml").read_text() + IN_ORDER)
    return run_folder("one_rank", tmp_path / "out")


def go_on(folder: Path, ranks: int, file: str, *arguments: str) -> dict[int, dict[str, float]]:
    given = (*SIZES, "--metrics.no_enable_tensorboard", "--profiling.no_enable_profiling", *arguments)
    return {one["step"]: one for one in train(folder, ranks, *given, file=str(folder.parent / file))}


@pytest.mark.parametrize("layout", ON_TWO)
def test_the_next_steps_are_its_own(there, layout):
    ranks, arguments = ON_TWO[layout]
    seen = go_on(there, ranks, "in_order.toml", "--checkpoint.load_step=3", *arguments)
    wanted = {
        one["step"]: one for one in json.loads((TORCHTITAN_FOLDER / "losses.json").read_text()) if one["step"] > 3
    }
    assert seen.keys() == wanted.keys() == {4, 5, 6}
    for step, theirs in wanted.items():
        ours = seen[step]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), step
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), step
        assert ours["lr"] == theirs["lr"], step
        assert ours["tokens_seen"] == step * 2 * 24


def test_shuffled_data_begin_anew(there):
    assert go_on(there, 1, "run.toml", "--checkpoint.load_step=3", "--training.steps=5").keys() == {4, 5}
