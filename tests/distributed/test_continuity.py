"""What a resume keeps, what it shows, and what it refuses to change unasked."""

from __future__ import annotations

import json
import logging
import shutil

import oracle
import pytest
import torch
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, largest_difference, one_rank, train

from quadriga.checkpoint import folder as folders
from quadriga.errors import UserError

SAVING = ("--checkpoint.enable", "--lr_scheduler.total_steps=6")
FREE_BATCH = tuple(argument for argument in TINY if "global_batch_size" not in argument)


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    caplog.set_level(logging.INFO, "quadriga")
    return caplog


def alone(folder, monkeypatch, *arguments):
    """One rank, in this process."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    return one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *arguments], log=False)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of one rank that was saved after two steps. Tests go on in a copy of it."""
    folder = tmp_path_factory.mktemp("two_steps")
    train(folder, 1, *TINY, *SAVING, "--training.steps=2")
    return folder


@pytest.fixture
def saved(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "saved")


def test_a_checkpoint_says_what_it_was_saved_by(tmp_path):
    train(tmp_path, 2, *TINY, *SAVING, "--training.steps=2")
    found = folders.find_complete(tmp_path / "checkpoint")
    assert found.contents == ("model", "optimizer", "random")
    assert found.extra["config"]["optimizer"]["lr"] == 8e-4
    assert found.extra["model"]["dim"] == 32
    assert (found.extra["global_batch_size"], found.extra["world_size"]) == (8, 2)
    assert found.extra["layout"]["dp_shard"] == 2
    assert found.extra["versions"]["torch"] == torch.__version__
    stood = found.extra["train_state"]
    assert (stood["step"], stood["tokens_seen"], stood["attempt"]) == (2, 512, 1)
    assert len(found.extra["dataloader"]["lanes"]) == 8


def test_what_differs_is_shown_and_a_new_rate_is_no_other_training(saved, monkeypatch, logged):
    assert alone(saved, monkeypatch, *TINY, *SAVING, "--training.steps=3", "--optimizer.lr=1e-4") == 0
    assert "changed since this checkpoint was saved: optimizer.lr: 0.0008 -> 0.0001" in logged.text
    assert "changed since this checkpoint was saved: training.steps: 2 -> 3" in logged.text


def test_a_key_of_the_initial_weights_alone_is_no_other_training(saved):
    """They are in the checkpoint; so an older one, which does not say how they were drawn, resumes too."""
    records = train(saved, 1, *TINY, *SAVING, "--training.steps=3", "--model.no_depth_init")
    assert [record["step"] for record in records] == [1, 2, 3]


def test_depth_init_reaches_the_initial_weights(tmp_path):
    """Of two layers the second has 0.02 / sqrt(4) either way, the first 0.02 / sqrt(2) or as the second."""
    found = {}
    for name, given in (("deep", ()), ("equal", ("--model.no_depth_init",))):
        train(tmp_path / name, 1, *TINY, *SAVING, *given, "--checkpoint.create_seed_checkpoint")
        weights = oracle.read_weights(tmp_path / name / "checkpoint/step-0", tmp_path / f"{name}.pt")
        found[name] = weights
    first, second = (f"layers.{layer}.feed_forward.w3.weight" for layer in (0, 1))
    assert [found["deep"][name].std().item() for name in (first, second)] == pytest.approx([0.0141421, 0.01], rel=0.06)
    assert torch.equal(found["equal"][second], found["deep"][second])
    torch.testing.assert_close(found["equal"][first], found["deep"][first] * 0.5**0.5)
    untouched = [name for name in found["deep"] if not name.startswith("layers.0.")]
    assert all(torch.equal(found["equal"][name], found["deep"][name]) for name in untouched)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--training.seq_len=16", "training.seq_len = 16"),
        ("--debug.seed=7", "debug.seed = 7"),
        ("--training.global_batch_size=16", "training.global_batch_size = 16"),
        ("--model.rope_theta=1234.0", "model.rope_theta = 1234.0"),
        ("--training.dataset=builtin_validation", "data of the checkpoint: dataset"),
    ],
)
def test_another_training_is_refused_unless_allowed(saved, argument, named):
    arguments = [one for one in TINY if not one.startswith(argument.partition("=")[0] + "=")]
    with pytest.raises(RankError) as refused:
        train(saved, 1, *arguments, *SAVING, "--training.steps=3", argument)
    assert named in str(refused.value)
    assert "--checkpoint.allow_change" in str(refused.value)
    records = train(saved, 1, *arguments, *SAVING, "--training.steps=3", argument, "--checkpoint.allow_change")
    assert [record["step"] for record in records] == [1, 2, 3]


def test_a_free_global_batch_means_the_saved_one(tmp_path, monkeypatch, logged):
    straight = train(
        tmp_path / "straight", 4, *FREE_BATCH, "--training.global_batch_size=-1", *SAVING, "--training.steps=4"
    )
    train(tmp_path / "moved", 4, *FREE_BATCH, "--training.global_batch_size=-1", *SAVING, "--training.steps=2")
    moved = train(tmp_path / "moved", 2, *FREE_BATCH, "--training.global_batch_size=-1", *SAVING, "--training.steps=4")
    assert [record["tokens_seen"] for record in moved] == [record["tokens_seen"] for record in straight]
    assert largest_difference(moved, straight, "loss") <= 1e-6
    with pytest.raises(RankError, match=r"training\.global_batch_size") as refused:
        train(tmp_path / "moved", 3, *FREE_BATCH, "--training.global_batch_size=-1", *SAVING, "--training.steps=5")
    assert "[the checkpoints in" in str(refused.value)


def test_a_seed_checkpoint_is_the_start_of_the_run(tmp_path):
    straight = train(tmp_path / "straight", 1, *TINY, *SAVING, "--training.steps=2")
    train(tmp_path / "seeded", 1, *TINY, *SAVING, "--training.steps=2", "--checkpoint.create_seed_checkpoint")
    assert folders.find_complete(tmp_path / "seeded/checkpoint").step == 0
    seeded = train(tmp_path / "seeded", 2, *TINY, *SAVING, "--training.steps=2")
    assert largest_difference(seeded, straight, "loss") <= 1e-6


def test_a_resumed_run_finds_its_random_numbers(tmp_path):
    """What is drawn after the state was put back is what was drawn after it was taken."""
    from quadriga.checkpoint.tensors import RandomState

    states = RandomState(3)
    torch.manual_seed(5)
    saved = {name: value.clone() for name, value in states.state_dict().items()}
    assert {name.partition(".")[0] for name in saved} == {"3"}
    import random

    import numpy as np

    drawn = torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()
    states.load_state_dict(saved)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()) == drawn


def test_checkpoints_may_lie_under_a_url(tmp_path):
    url = f"file://{tmp_path}/elsewhere"
    train(tmp_path / "run", 2, *TINY, *SAVING, f"--checkpoint.folder={url}", "--training.steps=2")
    records = train(tmp_path / "run", 2, *TINY, *SAVING, f"--checkpoint.folder={url}", "--training.steps=3")
    assert [record["attempt"] for record in records] == [1, 1, 2]
    assert json.loads((tmp_path / "elsewhere/step-3/train_state.json").read_text())["step"] == 3
    assert not (tmp_path / "run/checkpoint").exists()


CANNOT_BE = {
    "train_state": [None, {}, 7, {"step": 9, "tokens_seen": 1}, {"step": "2", "tokens_seen": 1}, {"step": 2}],
    "dataloader": [None, {}, {"fingerprint": 3, "lanes": {}}, "x"],
    "lr_scheduler": [None, {"done": "x"}, []],
    "config": [None, 3],
    "model": [None, []],
    "world_size": [None, "1", [2]],
    "global_batch_size": [None, "8", -1],
}


def refusals(argv: list[str], folder: str) -> list[str]:
    """What a start on one rank says for each value that a manifest cannot have."""
    from pathlib import Path

    from quadriga.comm import process_group

    manifest = Path(folder, "checkpoint/step-2/train_state.json")
    sound, reports = json.loads(manifest.read_text()), []
    for key, values in CANNOT_BE.items():
        for value in values:
            manifest.write_text(folders.format_manifest({**sound, "extra": {**sound["extra"], key: value}}))
            try:
                reports.append(f"{key} = {value}: taken, exit code {one_rank(argv, log=False)}")
            except UserError as error:
                reports.append(error.report)
            process_group.stop()
    return reports


def test_a_manifest_whose_run_cannot_be_is_reported_in_one_message(saved):
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(saved), *TINY, *SAVING, "--training.steps=3"]
    reports = run_ranks(refusals, 1, argv, str(saved), backend=None)[0]
    assert len(reports) == sum(map(len, CANNOT_BE.values()))
    for report in reports:
        assert report.startswith("quadriga: "), report
        assert len(report) < 4000


def test_another_document_mask_is_refused_unless_it_is_allowed(saved, tmp_path, monkeypatch):
    """The checkpoint is of a run without one. If it is allowed, the data go on where they were."""
    masked = (*TINY, *SAVING, "--training.steps=3", "--training.document_mask")
    copy = shutil.copytree(saved, tmp_path / "copy")
    records = train(copy, 1, *masked, "--checkpoint.allow_change")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["keys_per_token"] <= 16.5
    with pytest.raises(UserError, match=r"training\.document_mask") as refused:
        alone(saved, monkeypatch, *masked)
    assert "--checkpoint.allow_change" in str(refused.value)
