"""Plain values are read as they were pickled, by every writer; what is no plain value is refused, and runs nothing."""

from __future__ import annotations

import collections
import io
import pickle
import random
import tracemalloc

import pytest
import torch
from torchtitan_checkpoints import zip64

from quadriga import limits
from quadriga.checkpoint.plain_values import value_in_archive, value_of
from quadriga.checkpoint.plan_format import DTYPE_NAMES, PlanError, format_raw

VALUES = [
    None,
    True,
    -(2**31),
    2**62,
    0.1,
    float("inf"),
    "text with ü",
    "long " * 100,
    b"\x00\xff bytes",
    b"long" * 100,
    [],
    (1, 2, 3, 4),
    {"a": [1, (2, {"b": None}), "a"], 3: b"x"},
    list(range(70_000)),
    {"token_buffer": [5, 300, 70_000], "sample_idx": 2, "_num_yielded": 1, "same": "sample_idx"},
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20])
def test_what_was_pickled(value, protocol):
    assert value_of(pickle.dumps(value, protocol)) == value
    assert value_of(pickle._dumps(value, protocol)) == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20])
def test_what_torch_saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    assert value_in_archive(stream.getvalue()) == value


SHARED = [1, 2]
REFUSED = {
    "a function": pickle.dumps(len),
    "a class": pickle.dumps(collections.OrderedDict(a=1)),
    "a set": pickle.dumps({1, 2}),
    "a shared list": pickle.dumps([SHARED, SHARED]),
    "a huge number": pickle.dumps(1 << 200),
    "a key that is no text": pickle.dumps({(1, 2): 3}),
    "nothing": b"",
    "an opcode alone": b"\x80\x04\x94.",
    "a mark that stays": b"\x80\x04(.",
    "two values": b"\x80\x04K\x01K\x02.",
    "more behind it": pickle.dumps(1) + b"K",
    "bytes by another coding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86R.",
    "another function": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00lsX\x06\x00\x00\x00latin1\x86R.",
    "a name without an end": b"\x80\x02c_codecs",
    "protocol 0": pickle.dumps([1], 0),
    "a text that is encoded many times": (
        b"\x80\x02(" + b"c_codecs\nencode\nq\0X\x00\x10\x00\x00" + b"a" * 4096 + b"q\1"
        b"X\x06\x00\x00\x00latin1q\2\x86R" + b"h\0h\1h\2\x86R" * 2 + b"t."
    ),
    "a key of a million letters": b"\x80\x02}X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"Ns.",
    "text that is none": b"\x80\x04\x8c\x02\xff\xff.",
    "a tuple of a thousand levels": b"\x80\x02N" + b"\x85" * 1000 + b".",
    "a list of a hundred levels": b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_value_is_refused(name):
    with pytest.raises(PlanError):
        value_of(REFUSED[name])


def test_what_is_too_long_is_not_looked_at():
    with pytest.raises(PlanError, match="longer than the limit for a value"):
        value_of(b"\x80\x04" + b"N" * limits.OBJECT_BYTES)
    with pytest.raises(PlanError, match="longer than the limit for a value"):
        value_in_archive(b"PK" * limits.OBJECT_BYTES)


@pytest.mark.parametrize("opcode", [b"]", b"N", b"(", b"K\1"])
def test_a_value_of_too_many_parts_ends_early(opcode, monkeypatch):
    monkeypatch.setattr(limits, "OBJECT_OPCODES", 1000)
    with pytest.raises(PlanError, match="more values than the limit"):
        value_of(b"\x80\x02" + opcode * 2000)
    assert value_of(pickle.dumps([1] * 900)) == [1] * 900


def test_memory_grows_little_with_a_value_of_the_longest(monkeypatch):
    """All that an opcode of a byte can make is a list, of 64 bytes with its place."""
    tracemalloc.start()
    try:
        monkeypatch.setattr(limits, "OBJECT_OPCODES", limits.OBJECT_OPCODES // 20)
        with pytest.raises(PlanError):
            value_of(b"\x80\x02" + b"]" * (limits.OBJECT_BYTES // 20))
        assert tracemalloc.get_traced_memory()[1] < 200e6 / 20
    finally:
        tracemalloc.stop()


def test_a_value_of_any_depth_has_a_short_text():
    value: object = ()
    for _ in range(5000):
        value = (value,)
    assert format_raw(value) == "[[...]]"
    assert format_raw([(1, 2), "a", 3]) == "[[...], 'a', 3]"


@pytest.mark.parametrize("start", [1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_record_at_any_place_is_read_or_refused(start):
    assert value_in_archive(zip64(pickle.dumps(7, 2), 0)) == 7
    with pytest.raises(PlanError, match="not an archive of a value"):
        value_in_archive(zip64(pickle.dumps(7, 2), start))


def test_a_tensor_is_no_plain_value():
    stream = io.BytesIO()
    torch.save(torch.ones(3), stream)
    with pytest.raises(PlanError):
        value_in_archive(stream.getvalue())


def test_random_damage_is_refused_or_gives_plain_values():
    draw = random.Random(5)
    whole = pickle.dumps(VALUES[-1], 4)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            value = value_of(bytes(data))
        except PlanError:
            continue
        assert _is_plain(value)


def _is_plain(value) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(one) for key, one in value.items())
    return type(value) in (int, float, str, bytes, bool, type(None))


def test_every_dtype_of_torch_has_its_name():
    there = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert there <= DTYPE_NAMES
