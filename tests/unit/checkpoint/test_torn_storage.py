"""Whatever a disk does to the newest checkpoint: it is refused by the name of the file, and the one before is taken."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from weights import Weights

from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.config.schema import Checkpoint
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT

FILES = (".metadata", "__0_0.distcp", "plan.json", "train_state.json")
DAMAGES = ("truncate", "delete", "flip a bit")
CASES = 100


def manager(folder: Path, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Checkpoints of steps 3 and 8."""
    folder = tmp_path_factory.mktemp("pristine")
    for step in (3, 8):
        manager(folder).save(step, {"model": Weights(step)}, {"train_state": {"step": step, "tokens_seen": 512 * step}})
    return folder


def damage(path: Path, how: str, rng: random.Random) -> None:
    whole = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    else:
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_refused_by_name_and_the_one_before_is_taken(pristine, tmp_path, file, how):
    events = []
    for case in range(CASES // (len(FILES) * len(DAMAGES)) + 1):
        rng = random.Random(f"{file} {how} {case}")
        place = tmp_path / str(case)
        shutil.copytree(pristine, place)
        damage(place / "step-8" / file, how, rng)
        one = CheckpointManager(
            Checkpoint(enable=True), place, log_event=lambda *event, **facts: events.append((event, facts))
        )
        found = one.find()
        assert found.step == 3
        (event, facts) = events.pop()
        assert event == ("fallback", 3)
        assert facts["steps_lost"] == 5
        (refused,) = facts["refused"]
        assert str(place / "step-8" / file) in refused
        weights = Weights(0)
        one.load(found, {"model": weights})
        assert weights.held["a.weight"].eq(3).all()


def test_where_none_is_good_the_run_stops_with_a_code_of_its_own(pristine, tmp_path):
    place = tmp_path / "all"
    shutil.copytree(pristine, place)
    for step in (3, 8):
        damage(place / f"step-{step}" / "__0_0.distcp", "flip a bit", random.Random(step))
    with pytest.raises(CheckpointError) as caught:
        manager(place).find()
    assert caught.value.exit_code == EXIT_NO_GOOD_CHECKPOINT
    for step in (3, 8):
        assert str(place / f"step-{step}" / "__0_0.distcp") in str(caught.value)
    assert sorted(os.listdir(place)) == ["step-3", "step-8"], "nothing was changed"


def test_a_damaged_step_that_was_asked_for_is_not_replaced_by_another(pristine, tmp_path):
    place = tmp_path / "asked"
    shutil.copytree(pristine, place)
    damage(place / "step-8" / "__0_0.distcp", "truncate", random.Random(1))
    with pytest.raises(CheckpointError, match="step 8, which was requested, is damaged"):
        manager(place, load_step=8).find()
    assert manager(place, load_step=3).find().step == 3


def test_the_damaged_one_counts_for_nothing_when_old_ones_are_deleted(pristine, tmp_path):
    """With the two newest kept, a bad one must not push the only good one out."""
    place = tmp_path / "kept"
    shutil.copytree(pristine, place)
    damage(place / "step-8" / "__0_0.distcp", "flip a bit", random.Random(2))
    one = manager(place, keep_latest_k=2)
    assert one.find().step == 3
    one.save(6, {"model": Weights(6)}, {})
    assert sorted(os.listdir(place)) == ["step-3", "step-6", "step-8"]
    one.save(8, {"model": Weights(8)}, {})  # the replayed step takes the place of the damaged one
    assert sorted(os.listdir(place)) == ["step-6", "step-8"]
    assert manager(place).find().step == 8


def test_only_remains_of_a_save_are_reported_as_a_warning(tmp_path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    remains = tmp_path / ".step-7.saving"
    remains.mkdir()
    (remains / "__0_0.distcp").write_bytes(b"half")
    with caplog.at_level(logging.WARNING, "quadriga"):
        assert manager(tmp_path).find() is None
    assert "THIS RUN STARTS AT STEP 0" in caplog.text
    assert ".step-7.saving" in caplog.text


def test_a_folder_of_torch_s_own_is_a_place_to_start_from(tmp_path, pristine):
    """Names with and without the first word, as other savers write them."""
    import warnings

    from torch.distributed import checkpoint as dcp

    for prefix in ("", "model."):
        place = tmp_path / f"dcp{prefix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({f"{prefix}{name}": value for name, value in Weights(4).held.items()}, checkpoint_id=place)
        one, weights = manager(tmp_path / f"run{prefix}", initial_load_path=str(place)), Weights(0)
        found = one.find()
        assert (found.step, found.resume) == (0, False)
        one.load(found, {"model": weights, "optimizer": Weights(0)})
        assert weights.held["a.weight"].eq(4).all()
