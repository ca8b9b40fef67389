"""A checkpoint of torchtitan is recognised, read without unpickling, and gives weights and moments in our order."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchtitan_checkpoints import SPEC, by_dcp, expected, our_name, unpack

from quadriga import limits
from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import titan
from quadriga.checkpoint.folder import CheckpointError, InvalidCheckpoint
from quadriga.checkpoint.load import halves_to_interleaved, interleaved_to_halves, read_titan
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.config.schema import Checkpoint
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, UserError
from quadriga.models import registry
from quadriga.train import header

NAMES = registry.tensor_names(SPEC)


class Held:
    """A part of a run: zeros of the right shapes."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self.held = {name: torch.zeros(shape) for name, shape in NAMES.shapes.items()}
        if keys:
            self.held = {
                f"{name}.{key}": torch.zeros(() if key == "step" else shape)
                for name, shape in NAMES.shapes.items()
                for key in keys
            }

    def state_dict(self):
        return self.held

    def load_state_dict(self, loaded):
        self.held = dict(loaded)


def parts() -> dict[str, Held]:
    return {"model": Held(), "optimizer": Held(titan.MOMENTS)}


def manager(folder: Path, **keys: object) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder)


def flat(states: dict[str, Held]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, state in states.items() for name, value in state.held.items()}


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    caplog.set_level(logging.INFO, "quadriga")
    return caplog


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return unpack("one_rank", tmp_path / "checkpoint")


def test_what_a_checkpoint_says_of_its_run(one, tmp_path):
    whole, last = titan.inspect(one / "step-3"), titan.inspect(one / "step-6")
    assert (whole.step, whole.contents, whole.trainer) == (3, ("model", "optimizer"), "torchtitan")
    assert whole.extra["train_state"] == {"step": 3, "tokens_seen": 3 * 2 * 24}
    assert whole.extra["lr_scheduler"] == {"done": 3}
    place = whole.extra["dataloader"]
    assert place.keys() == {"ranks", "documents", "tokens_left"}
    assert place["ranks"] == 1
    assert place["documents"] > 1
    assert (last.step, last.contents, last.extra) == (6, ("model",), {})
    two = titan.inspect(unpack("two_ranks", tmp_path / "two") / "step-2")
    assert two.extra["train_state"] == {"step": 2, "tokens_seen": 2 * 2 * 2 * 24}, "each rank counts its own"
    assert "2 data-parallel ranks" in two.extra["dataloader"]["unknown"]


@pytest.mark.parametrize("name", ["one_rank", "two_ranks"])
def test_weights_and_moments_are_those_of_dcp_with_rows_in_order(name, tmp_path):
    step = unpack(name, tmp_path) / ("step-3" if name == "one_rank" else "step-2")
    states = parts()
    read_titan(step, flat(states), NAMES, None)
    wanted = expected(step)
    assert flat(states).keys() == wanted.keys()
    for key, value in flat(states).items():
        assert torch.equal(value, wanted[key]), key
    moved = [key for key, value in by_dcp(step).items() if not torch.equal(value, wanted[our_name(key)])]
    assert len(moved) == 2 * 2 * 3, "wq and wk of two layers, each with two moments"
    assert wanted["optimizer.norm.weight.step"] == int(step.name[-1])


def test_both_orders_are_each_others_reverse():
    rows = torch.arange(24.0).reshape(24, 1).expand(24, 3).clone()
    assert interleaved_to_halves(rows, 8)[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(halves_to_interleaved(interleaved_to_halves(rows, 8), 8), rows)
    assert torch.equal(interleaved_to_halves(halves_to_interleaved(rows, 4), 4), rows)


def test_a_run_folder_of_theirs_goes_on_from_the_newest(one):
    states, before = parts(), _contents(one)
    checkpoints = manager(one, load_step=3, keep_latest_k=2)
    found = checkpoints.find()
    assert (found.step, found.resume, found.trainer) == (3, True, "torchtitan")
    checkpoints.load(found, states, NAMES)
    for step in (4, 5, 7):
        checkpoints.save(step, states, {"n": step})
    assert sorted(os.listdir(one)) == ["step-3", "step-5", "step-6", "step-7"], "of ours the two newest stay"
    assert {name: content for name, content in _contents(one).items() if name in before} == before
    ours = manager(one).find()
    assert (ours.step, ours.trainer) == (7, ""), "the newest of both"


def test_a_save_of_the_same_step_leaves_theirs(one):
    states, before = parts(), _contents(one / "step-6")
    checkpoints = manager(one, load_step=3)
    checkpoints.load(checkpoints.find(), states, NAMES)
    checkpoints.save(6, states, {})
    assert _contents(one / "step_6.theirs") == before
    assert folders.read_checkpoint(one / "step-6").step == 6
    assert manager(one).find().trainer == ""


def test_a_last_save_of_weights_alone(one, tmp_path):
    """The newest cannot be gone on from, and says so; a new run can start from it."""
    for excluded in ((), ("optimizer",), ("optimizer", "dataloader", "train_state")):
        with pytest.raises(UserError, match=r"only the weights.*no run can resume"):
            manager(one, exclude_from_loading=excluded).find()
    with pytest.raises(UserError, match="only the weights"):
        manager(tmp_path / "a", initial_load_path=str(one / "step-6"), initial_load_model_only=False).find()
    states = parts()
    checkpoints = manager(tmp_path / "b", initial_load_path=str(one / "step-6"))
    found = checkpoints.find()
    checkpoints.load(found, states, NAMES)
    assert not found.resume
    for key, value in expected(one / "step-6").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(flat(states)[key], value.float()), key
    assert not any(value.any() for value in states["optimizer"].held.values())


@pytest.mark.parametrize("path", ["step-3", "."])
def test_initial_load_path_takes_all_or_the_weights(path, one, tmp_path):
    (one / "step-6").rename(tmp_path / "away")
    for only in (True, False):
        states = parts()
        place = str(one / path) if path != "." else str(one)
        checkpoints = manager(tmp_path / f"new{only}", initial_load_path=place, initial_load_model_only=only)
        found = checkpoints.find()
        assert found.resume != only
        assert found.extra == {} if only else found.extra["train_state"]["step"] == 3
        checkpoints.load(found, states, NAMES)
        wanted = expected(one / "step-3")
        for key, value in flat(states).items():
            assert torch.equal(value, torch.zeros_like(value) if only and "optimizer" in key else wanted[key]), key


def test_parts_can_be_left_out(one):
    states = parts()
    checkpoints = manager(one, load_step=3, exclude_from_loading=("optimizer", "dataloader"))
    found = checkpoints.find()
    checkpoints.load(found, states, NAMES)
    assert found.extra.keys() == {"train_state", "lr_scheduler"}
    assert states["model"].held["norm.weight"].any()
    assert not any(value.any() for value in states["optimizer"].held.values())


def test_another_model_is_refused_in_one_message(one):
    from dataclasses import replace

    for spec, what in (
        (replace(SPEC, n_layers=3), r"has 2 layers, width 16, vocabulary 272; the configuration 3, 16, 272$"),
        (replace(SPEC, n_layers=1, vocab_size=2048), r"has 2 layers, .*; the configuration 1, 16, 2,048$"),
        (replace(SPEC, ffn_dim=56), r"another model: shapes differ: .*\[48, 16\] in the checkpoint, \[56, 16\]"),
        (replace(SPEC, tie_embeddings=True), r"another model: only the checkpoint has output\.weight$"),
    ):
        names = registry.tensor_names(spec)
        with pytest.raises(UserError) as caught:
            read_titan(one / "step-3", {f"model.{n}": torch.zeros(s) for n, s in names.shapes.items()}, names, None)
        (problem,) = caught.value.problems
        assert re.search(what, problem.what), problem.what


def test_a_torn_one_is_passed_over(one):
    shard = one / "step-6/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="are needed"):
        titan.inspect(one / "step-6")
    checkpoints = manager(one)
    assert checkpoints.find().step == 3
    (one / "step-3/__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="no published checkpoint is good") as caught:
        manager(one).find()
    assert caught.value.exit_code == 3


def test_names_that_are_not_theirs_are_no_checkpoint_of_theirs(tmp_path):
    from quadriga.checkpoint.tensors import save_tensors

    place = tmp_path / "step-3"
    place.mkdir()
    save_tensors(
        place, {"model.layers.0.attention.wq.weight": torch.ones(8, 8), "optimizer.a.exp_avg": torch.ones(3)}, None
    )
    (place / "plan.json").unlink()
    assert titan.inspect(place) is None
    with pytest.raises(CheckpointError, match="do not have torchtitan's names"):
        manager(tmp_path).find()


def test_whether_a_run_is_finished_is_seen_without_a_look_into_an_unfinished_one(one, monkeypatch):
    """Every rank asks for it at each start, and `.metadata` of a large model has many megabytes."""
    looked = []
    real = titan.inspect
    monkeypatch.setattr(titan, "inspect", lambda path: looked.append(Path(path).name) or real(path))
    places = SimpleNamespace(checkpoint=str(one), dump=str(one.parent))
    for steps, step, finished in ((9, -1, False), (7, 6, False), (6, -1, True), (5, -1, True), (3, 3, True)):
        looked.clear()
        spec = SimpleNamespace(steps=steps, folders=places)
        run = SimpleNamespace(config=SimpleNamespace(checkpoint=Checkpoint(load_step=step)), spec=spec)
        assert header.log_if_finished(run) == finished
        assert looked == ([f"step-{6 if step == -1 else step}"] if finished else [])


INDEX = "model.safetensors.index.json"
WITHOUT_A_PLAN = {
    "a last save in Hugging Face's form": ((INDEX, "model-00001-of-00001.safetensors"), "initial_load_in_hf"),
    "shards that were never put together": (
        ("sharded/shard-00001-model-00001-of-00001.safetensors",),
        "unfinished save",
    ),
    "a save that was cut off": (("__0_0.distcp", "__1_0.distcp"), "unfinished save"),
}


@pytest.mark.parametrize("name", WITHOUT_A_PLAN)
def test_a_save_of_theirs_without_a_plan_is_named_and_kept(name, one, logged):
    written, says = WITHOUT_A_PLAN[name]
    (one / "step-6").rename(one.parent / "away")
    for file in written:
        (one / "step-6" / file).parent.mkdir(parents=True, exist_ok=True)
        (one / "step-6" / file).write_bytes(file.encode())
    before, states = _contents(one / "step-6"), parts()
    checkpoints = manager(one)
    assert checkpoints.find().step == 3
    assert str(one / "step-6") in logged.text
    assert says in logged.text
    checkpoints.save(6, states, {})
    assert _contents(one / "step_6.theirs") == before
    assert folders.read_checkpoint(one / "step-6").step == 6


def test_a_last_save_in_hugging_faces_form_alone_is_no_start_from_scratch(tmp_path):
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-6" / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="initial_load_in_hf") as caught:
        manager(tmp_path).find()
    assert caught.value.exit_code == EXIT_NO_GOOD_CHECKPOINT
    with pytest.raises(CheckpointError, match="initial_load_in_hf"):
        manager(tmp_path, load_step=6).find()


class CommandPickle:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("name", ["train_state.step", "lr_scheduler.last_epoch", "dataloader.dp_rank_0"])
def test_a_crafted_value_runs_nothing(name, one, tmp_path):
    flag = tmp_path / "flag"
    stream = io.BytesIO()
    torch.save(CommandPickle(flag) if name != "dataloader.dp_rank_0" else pickle.dumps(CommandPickle(flag)), stream)
    archive, step = stream.getvalue(), one / "step-3"
    _put(step, name, archive)
    if name == "dataloader.dp_rank_0":
        assert "cannot be read" in titan.inspect(step).extra["dataloader"]["unknown"]
    else:
        with pytest.raises(InvalidCheckpoint, match="no plain value"):
            titan.inspect(step)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("value", "what"), [(-1, "not a count"), (3.0, "not a count"), ("3", "not a count"), (4, "the name of its folder")]
)
def test_a_step_that_cannot_be_is_refused(value, what, one):
    stream = io.BytesIO()
    torch.save(value, stream)
    _put(one / "step-3", "train_state.step", stream.getvalue())
    with pytest.raises(InvalidCheckpoint, match=what):
        titan.inspect(one / "step-3")


def test_a_number_is_short(one):
    """Only a data loader's state may be long; a number behind megabytes of others is refused before it is read."""
    stream = io.BytesIO()
    torch.save("a" * 2 * limits.OBJECT_NUMBER_BYTES, stream)
    _put(one / "step-3", "train_state.step", stream.getvalue())
    with pytest.raises(InvalidCheckpoint, match="not a valid length or position of a value"):
        titan.inspect(one / "step-3")


def test_transformed_values_are_refused(one):
    """They are not taken for absent: the training state would be lost without a word."""
    metadata = pickle.loads((one / "step-3/.metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "train_state.step":
            info.transform_descriptors = ["stream.zstd/1"]
    (one / "step-3/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InvalidCheckpoint, match=r"'train_state\.step' was saved with a transform .*zstd"):
        titan.inspect(one / "step-3")


def _put(step: Path, name: str, archive: bytes) -> None:
    """Write another value behind the others, and let `.metadata` lead there."""
    with (step / "__0_0.distcp").open("ab") as file:
        start = file.tell()
        file.write(archive)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            info.offset, info.length = start, len(archive)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
