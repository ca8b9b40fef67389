"""What `quadriga convert to-torchtitan` writes is what torchtitan writes: names, kinds and values, rows in its order.

That torchtitan itself goes on from it is shown with the package (`test_continue_torchtitan.py`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torchtitan_checkpoints import SIZES, TORCHTITAN_FOLDER, by_dcp, expected, run_folder
from training import train

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import manifest, titan
from quadriga.checkpoint.metadata_entries import read_entries
from quadriga.checkpoint.plain_values import value_in_archive, value_of
from quadriga.cli.convert import main
from quadriga.errors import UserError

QUIET = ("--metrics.no_enable_tensorboard", "--profiling.no_enable_profiling")
KEPT = ("--checkpoint.export_dtype=float32",)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of torchtitan went on here for one step, from step 3 to step 4, on two ranks."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "tests").mkdir()
    (folder / "tests/assets").symlink_to(TORCHTITAN_FOLDER / "data")
    order = "[training.dataloader]\nshuffle = false\nwindow_overlap = 0\n"
    (folder / "run.toml").write_text((TORCHTITAN_FOLDER / "run.toml").read_text() + order)
    run_folder("one_rank", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        go_on(folder / "out", 2, 4, "--checkpoint.load_step=3", "--training.local_batch_size=1")
    return folder


def go_on(folder: Path, ranks: int, steps: int, *arguments: str) -> list[dict[str, float]]:
    keys = (*SIZES, *QUIET, *KEPT, "--lr_scheduler.total_steps=6", f"--training.steps={steps}", *arguments)
    return train(folder, ranks, *keys, file=str(folder.parent / "run.toml"))


def values(step: Path) -> dict[str, object]:
    """What is no tensor, by name."""
    found = {}
    for name, (file, start, length) in read_entries((step / ".metadata").read_bytes()).objects.items():
        found[name] = value_in_archive((step / file).read_bytes()[start : start + length])
    return found


def test_names_and_values_are_those_of_torchtitan(start, monkeypatch, capsys):
    monkeypatch.chdir(start)
    assert main(["to-torchtitan", "out/checkpoint/step-4", "there"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "there/step-4\n"
    assert "the saved learning rate" not in captured.err
    theirs, ours = start / "out/checkpoint/step-3", start / "there/step-4"
    assert by_dcp(ours).keys() == by_dcp(theirs).keys()
    saved, wanted = values(ours), values(theirs)
    assert saved.keys() == wanted.keys()
    assert {name: type(value) for name, value in saved.items()} == {name: type(one) for name, one in wanted.items()}
    same = {name for name in saved if not name.endswith((".lr", "dp_rank_0", "_epoch", "_count", "_last_lr"))}
    same -= {"train_state.step", "train_state.ntokens_seen", "optimizer.param_groups.norm.weight.initial_lr"}
    assert {name: saved[name] for name in same} == {name: wanted[name] for name in same}
    assert saved["train_state.step"] == saved["lr_scheduler.last_epoch"] == 4
    assert saved["lr_scheduler._step_count"] == 5
    assert saved["train_state.ntokens_seen"] == 4 * 48
    steps = {one["step"]: one for one in json.loads((TORCHTITAN_FOLDER / "losses.json").read_text())}
    assert saved["lr_scheduler._last_lr"] == [steps[5]["lr"]]
    assert saved["optimizer.param_groups.norm.weight.lr"] == steps[5]["lr"]
    place, before = value_of(saved["dataloader.dp_rank_0"]), value_of(wanted["dataloader.dp_rank_0"])
    assert place.keys() == before.keys()
    assert (before["_num_yielded"], place["_num_yielded"]) == (3, 4 * 2), "batches of two rows there, of one here"
    assert place["dataset_state"].keys() == before["dataset_state"].keys()
    assert not [path for path in ours.iterdir() if path.suffix == ".json"]


def test_tensors_are_ours_with_rows_in_their_order(start, monkeypatch):
    monkeypatch.chdir(start)
    main(["to-torchtitan", "out/checkpoint/step-4", "tensors"])
    from test_older_checkpoints import empty

    from quadriga.checkpoint.load import load_tensors

    found = folders.read_checkpoint(start / "out/checkpoint/step-4")
    ours = {name: value for name, value in empty(Path(found.location)).items() if not name.startswith("random")}
    load_tensors(found.location, ours, None, facts=found.files, optional="random.", may_hold_more=True)
    theirs = expected(start / "tensors/step-4")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    unturned = by_dcp(start / "tensors/step-4")["layers.1.attention.wk.weight"]
    assert not torch.equal(unturned, ours["model.layers.1.attention.wk.weight"])


def test_a_run_goes_on_from_it_with_the_same_losses(start, tmp_path, monkeypatch):
    """Here, as from any checkpoint of torchtitan's: steps 5 and 6 are those of the run that stayed there."""
    monkeypatch.chdir(start)
    main(["to-torchtitan", "out", str(start / "again/checkpoint")])
    wanted = {one["step"]: one["loss"] for one in json.loads((TORCHTITAN_FOLDER / "losses.json").read_text())}
    seen = go_on(start / "again", 1, 6)
    assert [one["step"] for one in seen] == [5, 6]
    for one in seen:
        assert one["loss"] == pytest.approx(wanted[one["step"]], rel=1e-5)


def test_what_cannot_be_known_is_left_out(start, tmp_path, monkeypatch, capsys):
    """Shuffled data have no position there; the line says how its loader begins anew."""
    monkeypatch.chdir(start)
    shuffled = ("--training.dataloader.shuffle", "--training.dataloader.window_overlap=1")
    go_on(start / "shuffled", 1, 1, *shuffled)
    main(["to-torchtitan", "shuffled", str(tmp_path)])
    assert "dataloader" not in {name.partition(".")[0] for name in values(tmp_path / "step-1")}
    output = capsys.readouterr().err
    assert "--checkpoint.exclude_from_loading dataloader" in output
    assert "shuffled its data" in output


def test_a_finished_run_says_what_rate_its_next_step_has(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(start)
    go_on(start / "finished", 1, 2, "--lr_scheduler.total_steps=2", "--lr_scheduler.warmup_steps=1")
    main(["to-torchtitan", "finished", str(tmp_path)])
    assert "the saved learning rate is 0, the end of this run's schedule" in capsys.readouterr().err
    assert values(tmp_path / "step-2")["lr_scheduler._last_lr"] == [0.0]


def _with(name: str, value: object, extra: dict) -> dict:
    """`extra` with another value at `a.b`."""
    extra = json.loads(json.dumps(extra))
    *tables, last = name.split(".")
    table = extra
    for each in tables:
        table = table[each]
    table[last] = value
    return extra


CRAFTED = [
    *(("train_state", None), ("train_state", {}), ("train_state.step", 7), ("train_state.tokens_seen", "many")),
    *(("lr_scheduler", {}), ("lr_scheduler.done", -1), ("lr_scheduler.done", 1 << 70), ("global_batch_size", None)),
    *(("global_batch_size", 10**12), ("global_batch_size", 0), ("seed", "one"), ("dataloader", {})),
    *(("dataloader.lanes", {}), ("dataloader.lanes", 3), ("config.optimizer", 3), ("config.training", [])),
    *(("config", {}), ("config.model", None), ("model", []), ("model.dim", None), ("max_positions", "x")),
]


def test_a_crafted_manifest_is_one_message(start, tmp_path, monkeypatch):
    """One that fits its own hash: whoever writes a checkpoint can write it."""
    monkeypatch.chdir(start)
    step = tmp_path / "step-4"
    shutil.copytree(start / "out/checkpoint/step-4", step)
    file = step / "train_state.json"
    sound = json.loads(file.read_text())
    written = []
    for number, (name, value) in enumerate(CRAFTED):
        file.write_text(manifest.format_manifest({**sound, "extra": _with(name, value, sound["extra"])}))
        try:
            main(["to-torchtitan", str(step), str(tmp_path / f"there{number}")])
        except UserError:
            assert not (tmp_path / f"there{number}").exists(), name
        else:
            written.append(name)
    assert not written


def test_weights_alone_and_what_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.chdir(start)
    go_on(start / "alone", 1, 1, "--checkpoint.last_save_model_only")
    main(["to-torchtitan", "alone", str(tmp_path)])
    assert titan.inspect(tmp_path / "step-1").contents == ("model",)
    with pytest.raises(UserError, match="already exists"):
        main(["to-torchtitan", "alone", str(tmp_path)])
    with pytest.raises(UserError, match="not for to-torchtitan"):
        main(["to-torchtitan", "alone", str(tmp_path / "b"), "--dtype", "bfloat16"])
    go_on(start / "tied", 1, 1, "--model.tie_embeddings")
    with pytest.raises(UserError, match="has tied embeddings"):
        main(["to-torchtitan", "tied", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()
