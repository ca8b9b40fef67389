"""Files written past the cache: the same bytes whatever pieces they come in, on every file system."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.checkpoint import files

BLOCK, PIECE = files.BLOCK, files.BUFFER_BYTES
lengths = st.one_of(st.integers(0, 3 * BLOCK), st.sampled_from([BLOCK, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + BLOCK]))


@pytest.fixture(scope="module")
def random_bytes():
    return os.urandom(3 * PIECE)


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.tuples(lengths, st.booleans()), max_size=5))
def test_a_file_holds_what_was_written(tmp_path_factory, random_bytes, pieces):
    path = tmp_path_factory.getbasetemp() / "direct"
    expected = b""
    with files.create_direct(path) as file:
        for length, flush in pieces:
            assert file.write(random_bytes[:length]) == length
            expected += random_bytes[:length]
            assert file.tell() == len(expected)
            if flush:
                file.flush()
                assert len(expected) - path.stat().st_size < BLOCK, "all but the last part of a block is in the file"
    assert path.read_bytes() == expected


def test_an_older_file_is_replaced_and_any_buffer_will_do(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3 * BLOCK)
    with files.create_direct(path) as file:
        file.write(memoryview(b"abcd").cast("i"))
    assert path.read_bytes() == b"abcd"


def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, random_bytes):
    """Such as FUSE and older tmpfs: opening a file with the flag is an invalid argument there."""
    opened = os.open

    def refuse(path, flags, mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "file"
    with files.create_direct(path) as file:
        file.write(random_bytes[: PIECE + 5])
    assert path.read_bytes() == random_bytes[: PIECE + 5]


def write_to_a_full_disk(path):
    with files.create_direct(path) as file:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        file.write(b"x" * PIECE)


def test_other_troubles_stay(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.create_direct(tmp_path / "nowhere" / "file")
    with pytest.raises(OSError, match="No space left"):
        write_to_a_full_disk(tmp_path / "file")
