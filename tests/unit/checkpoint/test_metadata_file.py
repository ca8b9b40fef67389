"""`.metadata` is read without unpickling it: what DCP writes gives the same plan, and anything else is refused."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from opcode_fuzz import ExecutionWatch, case
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from quadriga import limits
from quadriga.checkpoint import opcodes, plan, stored, tensors
from quadriga.checkpoint.plan import PlanError

SHAPES = ((), (7,), (6, 5), (4, 3, 2), (2, 2, 2, 2), (2, 1, 2, 1, 2), (0, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool, torch.uint16)


def sample(tensors: int = 40, chunks: int = 1, big: int = 0) -> Metadata:
    """A plan of tensors of all kinds of shapes; rows are assigned to `chunks` files. `big`: added to each position."""
    entries, storage = {}, {}
    for number in range(tensors):
        name, shape = f"model.layers.{number}.w", SHAPES[number % len(SHAPES)]
        shape = (shape[0] * chunks, *shape[1:]) if shape else ()
        parts = []
        for part in range(chunks if shape else 1):
            rows = shape[0] // chunks if shape else 0
            offsets, sizes = torch.Size((part * rows, *[0] * (len(shape) - 1))), torch.Size((rows, *shape[1:]))
            if not shape:
                offsets = sizes = torch.Size(())
            if offsets in [one.offsets for one in parts[:1]]:
                break  # of no rows: all parts are one
            parts.append(ChunkStorageMetadata(offsets, sizes))
            info = _StorageInfo(f"__{part}_0.distcp", big + 5000 * number, 4000)
            storage[MetadataIndex(name, offsets, part)] = info
        properties = TensorProperties(dtype=DTYPES[number % len(DTYPES)])
        entries[name] = TensorStorageMetadata(properties, torch.Size(shape), parts)
    return Metadata(entries, {name: ("model", name, 0) for name in entries}, storage, StorageMeta("x"), "1.0.0")


WRITERS = {
    "C, protocol 4": lambda value: pickle.dumps(value, 4),
    "C, protocol 5": lambda value: pickle.dumps(value, 5),
    "Python, protocol 4": lambda value: pickle._dumps(value, 4),
}
SAMPLES = {
    "small": sample(),
    "many chunks": sample(tensors=14, chunks=600),
    "large positions": sample(big=1 << 45),
    "no tensor": sample(tensors=0),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", SAMPLES)
def test_it_gives_the_plan_that_a_save_writes_as_json(name, writer):
    metadata = SAMPLES[name]
    assert plan.parse_metadata(WRITERS[writer](metadata)) == plan.parse_plan(tensors.plan_text(metadata))


def test_objects_that_are_matched_as_a_whole_are_read_as_opcode_by_opcode(monkeypatch):
    data = pickle.dumps(SAMPLES["many chunks"])
    matched = plan.parse_metadata(data)
    monkeypatch.setattr(opcodes.Interpreter, "_record", lambda self, at: 0)
    assert plan.parse_metadata(data) == matched


def test_the_plan_makes_the_objects_of_dcp_again():
    metadata = SAMPLES["many chunks"]
    made = stored.dcp_metadata(plan.parse_plan(tensors.plan_text(metadata)), metadata.state_dict_metadata)
    assert made.state_dict_metadata == metadata.state_dict_metadata
    assert made.storage_data == metadata.storage_data
    assert [index.index for index in made.storage_data] == [index.index for index in metadata.storage_data]


def test_transforms_are_kept():
    metadata = sample(tensors=2)
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]
    made = plan.parse_metadata(pickle.dumps(metadata))
    assert made == plan.parse_plan(tensors.plan_text(metadata))
    assert stored.dcp_metadata(made, made.tensors).storage_data == metadata.storage_data


def test_pickled_objects_are_left_out():
    metadata = sample(tensors=3)
    metadata.state_dict_metadata["trainer"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("trainer")] = _StorageInfo("__0_0.distcp", 9, 9)
    assert plan.parse_metadata(pickle.dumps(metadata)) == plan.parse_plan(tensors.plan_text(metadata))


def changed(**fields):
    metadata = sample(tensors=3)
    for name, value in fields.items():
        setattr(metadata, name, value)
    return pickle.dumps(metadata)


REFUSED = {
    "empty": (b"", "ends too early"),
    "no pickle": (b"xyz", "an opcode that plans do not use"),
    "an older protocol": (pickle.dumps(sample(), 3), "protocol 3"),
    "cut off": (pickle.dumps(sample())[:-300], "ends too early"),
    "something behind it": (pickle.dumps(sample()) + b".", "left over"),
    "another value": (pickle.dumps({"a": 1}), "not the plan of a checkpoint"),
    "a set": (changed(planner_data={1, 2}), "an opcode that plans do not use"),
    "a nested tuple": (changed(planner_data={"a": (((1,),),)}), "a tuple of values that no plan has"),
    "an entry of another kind": (changed(state_dict_metadata={"a": 3}), "not a name of a tensor"),
    "no storage": (changed(storage_data={}), "is in no file"),
    "a number for the storage": (changed(storage_data=3), "a state that no Metadata has"),
    "a number of 9 bytes": (changed(planner_data={"a": 1 << 70}), "more than 64 bits"),
    "a long text": (changed(planner_data={"a": "a" * 5000}), "longer than any name"),
    "a long tuple": (changed(planner_data={"a": (1,) * 257}), "a tuple longer than any of a plan"),
    "a float": (changed(planner_data={"a": 1.5}), "an opcode that plans do not use"),
    "not UTF-8": (b"\x80\x04\x8c\x02\xff\xff.", "not UTF-8"),
    "a memo entry that is not there": (b"\x80\x04j\xff\xff\xff\xff.", "reads an empty stack or memo"),
    "a list in two places": (b"\x80\x04]\x94h\x00\x86.", "two places"),
    "a huge index of the memo": (b"\x80\x04Nr\xff\xff\xff\xff.", "an opcode that plans do not use"),
    "a duplicate": (b"\x80\x04N2\x86.", "an opcode that plans do not use"),
    "a key alone": (b"\x80\x04}(Nu.", "a key without a value"),
    "a call of the encoder": (b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93N\x85R.", "'_codecs.encode'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_has_is_refused_with_its_place(name):
    data, reason = REFUSED[name]
    with pytest.raises(PlanError, match=reason):
        plan.parse_metadata(data)


BOMBS = {
    "marks": b"(" * 10**6,
    "lists": b"]" * 10**6,
    "lists in lists": b"]" * 500_000 + b"a" * 499_999,
    "tuples in tuples": b")" + b"\x85" * 10**6,
    "tuples that double": b")" + b"\x94h\x00h\x00\x86\x940" * 100_000,
    "numbers": b"K\x01" * 10**6,
    "the memo": b"N" + b"\x94" * 10**6,
    "names": b"\x8c\x05torch\x8c\x04Size\x93" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_a_limit(name, monkeypatch):
    monkeypatch.setattr(limits, "METADATA_VALUES", 100_000)
    with pytest.raises(PlanError):
        plan.parse_metadata(b"\x80\x04" + BOMBS[name] + b".")


def test_a_long_file_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(limits, "METADATA_BYTES", 100)
    with pytest.raises(PlanError, match="longer than the limit for a plan"):
        plan.parse_metadata(pickle.dumps(sample()))


def run_cases(cases: range) -> None:
    """Each case is a plan or one refusal; nothing is imported, opened, compiled or called on the way."""
    sound = [pickle.dumps(SAMPLES["small"]), pickle._dumps(sample(tensors=3), 4), changed(planner_data={"a": ("b", 1)})]
    with ExecutionWatch() as watch:
        for number in cases:
            data = case(random.Random(f"opcodes {number}"), sound)
            message = ""
            try:
                with watch.reading():
                    plan.parse_metadata(data)
            except PlanError as error:
                message = str(error)
            assert len(message) < 500, number
            assert message.isprintable(), number
            assert not watch.seen, f"case {number}: {watch.seen}"


def test_random_opcodes_execute_nothing():
    run_cases(range(300))


@pytest.mark.slow
def test_ten_thousand_random_programs_execute_nothing():
    run_cases(range(10_000))


def test_the_watch_sees_what_unpickling_does():
    """That the test above can fail: most of its programs do something under pickle's own reader."""
    with ExecutionWatch() as watch:
        for number in range(200):
            data = case(random.Random(f"opcodes {number}"), [pickle.dumps(sample(tensors=3))])
            with watch.reading():
                watch.unpickle(data)
        assert {"Canary", "pickle.find_class"} <= set(watch.seen)
