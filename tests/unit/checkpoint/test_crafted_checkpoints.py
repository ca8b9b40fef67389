"""A checkpoint from somebody who means harm: it is refused by name, nothing of it runs, and no tensor is changed."""

from __future__ import annotations

import io
import itertools
import pickle
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from crafted import ATTACKS, CommandPickle, reseal_manifest
from ranks import run_ranks
from weights import Weights

from quadriga import limits
from quadriga.checkpoint import plan as plans
from quadriga.checkpoint import stored
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.manifest import is_file_name
from quadriga.checkpoint.plan import PlanError
from quadriga.checkpoint.stored import open_stored
from quadriga.checkpoint.tensors import RandomState
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError


def manager(folder: Path, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    manager(folder).save(8, {"model": Weights(8)}, {"train_state": {"step": 8, "tokens_seen": 1}})
    return folder / "step-8"


def load(one: CheckpointManager) -> Weights:
    weights = Weights(0)
    one.load(one.find(), {"model": weights})
    return weights


@pytest.mark.parametrize("way", ["resume", "initial_load_path", "foreign"])
@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_by_name_and_nothing_runs(pristine, tmp_path, name, way):
    step, flag = tmp_path / "run/step-8", tmp_path / "flag"
    shutil.copytree(pristine, step)
    ATTACKS[name](step, flag)
    if way == "foreign":
        (step / "train_state.json").unlink()
    else:
        reseal_manifest(step)
    one = manager(step.parent) if way == "resume" else manager(tmp_path / "new", initial_load_path=str(step))
    weights = Weights(0)
    with pytest.raises((CheckpointError, UserError)) as caught:
        one.load(one.find(), {"model": weights})
    assert not flag.exists()
    assert str(step) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    if "shard" not in name:  # found before any tensor is read
        assert weights.held["a.weight"].eq(0).all()


def test_metadata_is_not_looked_at_where_there_is_a_plan(pristine, tmp_path):
    step, flag = tmp_path / "run/step-8", tmp_path / "flag"
    shutil.copytree(pristine, step)
    (step / ".metadata").write_bytes(pickle.dumps(CommandPickle(flag)))
    reseal_manifest(step)
    assert load(manager(step.parent)).held["a.weight"].eq(8).all()
    assert not flag.exists()


def test_the_plan_is_parsed_once_and_dcp_reads_no_file_of_its_own(pristine, tmp_path, monkeypatch):
    """What was checked is what is used."""
    from quadriga.checkpoint import plan

    calls = []
    for name in ("parse_plan", "parse_metadata"):
        original = getattr(plan, name)
        monkeypatch.setattr(plan, name, lambda data, original=original, name=name: calls.append(name) or original(data))
    monkeypatch.setattr(pickle, "load", lambda file: pytest.fail("a file was unpickled"))
    for legacy in (False, True):
        step = tmp_path / str(legacy) / "step-8"
        shutil.copytree(pristine, step)
        if legacy:
            (step / "plan.json").unlink()
            reseal_manifest(step)
        assert load(manager(step.parent)).held["a.weight"].eq(8).all()
    assert calls == ["parse_plan", "parse_metadata"]


def test_pickled_entries_of_a_foreign_folder_are_left_alone(tmp_path):
    """Trainers put their counters beside the weights as pickled bytes: never planned, never read."""
    from torch.distributed import checkpoint as dcp

    place, flag = tmp_path / "dcp", tmp_path / "flag"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**Weights(4).held, "train_state": CommandPickle(flag)}, checkpoint_id=place)
    assert load(manager(tmp_path / "run", initial_load_path=str(place))).held["a.weight"].eq(4).all()
    assert not flag.exists()


def test_the_planner_refuses_bytes():
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    from quadriga.checkpoint.stored import TensorPlanner

    nothing = torch.Size((0,))
    item = ReadItem(LoadItemType.BYTE_IO, MetadataIndex("a"), nothing, MetadataIndex("a"), nothing, nothing)
    with pytest.raises(PlanError, match="'a' is a pickled object, which is not read"):
        TensorPlanner().load_bytes(item, None)


def test_the_cli_runs_nothing_either(pristine, tmp_path, capsys):
    from quadriga.cli.checkpoints import main

    for name in ("second_unpickling_differs", "plan_and_metadata_are_forged"):
        step, flag = tmp_path / name / "step-8", tmp_path / "flag"
        shutil.copytree(pristine, step)
        ATTACKS[name](step, flag)
        reseal_manifest(step)
        main([str(step.parent), "--verify"])
        assert not flag.exists()
    assert "verified" in capsys.readouterr().out, "its hashes do fit: they protect against damage, not forgery"


def archive(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def test_records_that_differ_in_case_are_not_confused():
    """torch's reader of archives would take `a/DATA.PKL` for the pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive(torch.arange(4.0)))) as sound, zipfile.ZipFile(file, "w") as made:
        made.writestr("a/DATA.PKL", b"\x80\x02cbuiltins\nbytearray\nq\x00M\x00\x10\x85q\x01Rq\x02.")
        for record in sound.infolist():
            made.writestr(f"a/x/{record.filename.partition('/')[2]}", sound.read(record))
        for name, content in (("version", "3\n"), (".format_version", "1"), ("byteorder", "little")):
            made.writestr(f"a/{name}", content)
    data = file.getvalue()
    confused = torch.load(io.BytesIO(data), weights_only=True)
    assert type(confused) is bytearray
    assert len(confused) == 4096
    read = stored.read_chunk(io.BytesIO(data), len(data), torch.float32, [4])
    assert read.equal(torch.arange(4.0))


@pytest.mark.parametrize("held", [0, 3])
def test_a_tensor_of_more_numbers_than_its_storage_is_refused(held):
    """It would be filled with what lay in memory before."""
    tensor = torch.arange(200.0)
    with zipfile.ZipFile(io.BytesIO(archive(tensor))) as sound, zipfile.ZipFile(file := io.BytesIO(), "w") as made:
        for record in sound.infolist():
            content = sound.read(record)
            if record.filename.endswith("/data.pkl"):
                assert content.count(b"K\xc8") == 2  # numbers of the storage; the size
                content = content.replace(b"K\xc8", b"K" + bytes([held]), 1)
            elif record.filename.endswith("/data/0"):
                content = content[: 4 * held]
            made.writestr(record.filename, content)
        made.writestr("archive/padding", b"x" * 800)
    data = file.getvalue()
    with pytest.raises(PlanError, match="out of bounds for storage"):
        stored.read_chunk(io.BytesIO(data), len(data), torch.float32, [200])


TENSORS = [
    torch.arange(60.0).view(3, 4, 5),
    torch.arange(30.0).view(6, 5).t(),
    torch.tensor(3.0),
    torch.zeros(0, 4),
    torch.arange(7),
    torch.tensor([True, False]),
    torch.arange(5.0).bfloat16(),
    torch.arange(8.0).to(torch.float8_e4m3fn),
    torch.arange(32.0).view(2, 2, 2, 2, 2),
    torch.arange(3).to(torch.complex64),
    torch.arange(5).to(torch.uint16),
    torch.arange(10.0)[3:7],
]


@pytest.mark.parametrize("in_memory", [0, 1 << 24])
def test_a_chunk_is_what_was_saved(monkeypatch, in_memory):
    monkeypatch.setattr(stored, "IN_MEMORY", in_memory)
    for tensor in TENSORS:
        data = archive(tensor)
        part = stored.Slice(io.BytesIO(b"xx" + data + b"yy"), 2, len(data))
        read = stored.read_chunk(part, len(data), tensor.dtype, list(tensor.shape))
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def planned(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> bool:
    chunks = [[start, size, 0, 0, 10**6] for start, size in boxes]
    entry = {"dtype": "float32", "shape": shape, "chunks": chunks}
    try:
        plans.validate_plan({"format": plans.FORMAT, "files": ["f"], "tensors": {"t": entry}})
    except PlanError as error:
        return "do not make up its shape" not in str(error)
    return True


def test_chunks_cover_their_tensor_exactly_once():
    """Not only in sum: numbers that no chunk holds would be those that lay in memory before."""
    assert planned([], [([], [])])
    assert planned([0], [([0], [0])])
    assert planned([0], [])
    assert planned([4], [([0], [4]), ([4], [0])])
    assert planned([7, 4], [([0, 0], [4, 4]), ([4, 0], [3, 2]), ([4, 2], [3, 2])])
    assert not planned([4], [([0], [2]), ([1], [2])])
    assert not planned([2, 2], [([0, 0], [1, 2]), ([0, 1], [2, 1])])
    assert not planned([2, 2], [([0, 0], [2, 1]), ([1, 0], [1, 2])])


def test_chunks_are_judged_as_by_painting_them():
    draw, seen = random.Random(7), set()
    for _ in range(1500):
        shape = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))]
        boxes = [([0] * len(shape), list(shape))]
        for _ in range(draw.randint(1, 4)):
            (start, size), axis = boxes.pop(draw.randrange(len(boxes))), draw.randrange(len(shape))
            cut = draw.randint(0, size[axis])
            for first, extent in ((0, cut), (cut, size[axis] - cut)):
                boxes.append((list(start), list(size)))
                boxes[-1][0][axis] += first
                boxes[-1][1][axis] = extent
        if draw.random() < 0.7:
            (start, size), axis = draw.choice(boxes), draw.randrange(len(shape))
            start[axis] = draw.randint(0, shape[axis] - size[axis])
        if len({tuple(start) for start, _ in boxes}) < len(boxes):
            continue  # two chunks that begin alike are refused without looking at their extents
        painted = np.zeros(shape, int)
        for start, size in boxes:
            for place in itertools.product(*(range(a, a + b) for a, b in zip(start, size, strict=True))):
                painted[place] += 1
        sound = bool((painted == 1).all())
        assert planned(shape, boxes) == sound, (shape, boxes)
        seen.add(sound)
    assert seen == {True, False}


def opened_by_a_rank(place: str) -> str:
    from torch import distributed as dist

    limits.PLAN_CHUNKS = 1000
    try:
        open_stored(place, dist.new_group(backend="gloo"))
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_a_plan_that_other_ranks_would_refuse_is_refused_on_all(tmp_path):
    """Names full of brackets: as JSON they look like more entries than the limit for a plan."""
    from torch.distributed import checkpoint as dcp

    place = tmp_path / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("sound", "[" * 4000):
            dcp.save({f"{name}{n}": torch.zeros(1) for n in range(3)}, checkpoint_id=place / name[:5])
    outcomes = run_ranks(opened_by_a_rank, 2, str(place / "sound"))
    assert outcomes == ["opened"] * 2
    first, second = run_ranks(opened_by_a_rank, 2, str(place / "[[[[["))
    assert first == second
    assert "more entries than the limit for a plan" in first
    assert str(place) in first


def broken(name: str, position: int, value: int) -> dict[str, torch.Tensor]:
    states = {key: value.clone() for key, value in RandomState(0).state_dict().items()}
    states[f"0.{name}"][position] = value
    return states


GENERATORS = {
    "numpy, a position far away": ("numpy", 0, 10**8),
    "numpy, a position before": ("numpy", 0, -1),
    "numpy, a position just behind": ("numpy", 0, 625),
    "numpy, a word that is none": ("numpy", 3, -1),
    "numpy, a large word": ("numpy", 3, 1 << 32),
    "python, another version": ("python", 0, 9),
    "python, a position": ("python", -1, 10**8),
    "python, a word": ("python", 4, -1),
    "torch, more left than there are": (
        "torch",
        slice(8, 24),
        torch.tensor([112, 2, 0, 0, 1, 0, 0, 0, 112, 2] + [0] * 6),
    ),
    "torch, no state": ("torch", slice(0, None), 255),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_state_that_no_generator_has_is_refused_with_a_remedy(tmp_path, name):
    class Broken:
        def state_dict(self):
            return broken(*GENERATORS[name])

    def states(random_state):
        return {"model": Weights(8), "random": random_state}

    manager(tmp_path).save(8, states(Broken()), {})
    one = manager(tmp_path)
    with pytest.raises(UserError, match="not a state of a random generator") as caught:
        one.load(one.find(), states(RandomState(0)))
    assert f"random.0.{GENERATORS[name][0]}" in str(caught.value)
    assert "--checkpoint.exclude_from_loading '[\"random\"]'" in str(caught.value)
    without = manager(tmp_path, exclude_from_loading=("random",))
    without.load(without.find(), states(RandomState(0)))
    assert (torch.rand(2).numel(), 0 <= random.random() < 1, np.random.rand(2).size) == (2, True, 2)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "\ud800", "a" * 256])
def test_a_plan_lists_names_of_files_only(name):
    """Found by the fuzzer: JSON can contain a lone surrogate, which `os.stat` does not take."""
    assert not is_file_name(name)
    with pytest.raises(PlanError, match="is not a name of a file"):
        plans.validate_plan({"format": plans.FORMAT, "files": [name], "tensors": {}})
