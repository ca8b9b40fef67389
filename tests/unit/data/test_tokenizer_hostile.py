"""Tokenizer files of any content: one message with the file's name, and the process lives on, within its limits."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import TOKENIZER

from quadriga.config.assets import tokenizer_facts
from quadriga.data.tokenizer import build_tokenizer
from quadriga.errors import UserError

Change = dict[str, Any]
DIGITS = "9" * 5000


def bpe(**changes: Any) -> Change:
    return {"model": {**TOKENIZER["model"], **changes}}


def charsmap(raw: bytes) -> Change:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}}


def split(pattern: str) -> Change:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


UNIGRAM = {"type": "Unigram", "byte_fallback": False}
# What made the library of Rust panic, end the process, or take memory without an end.
CHANGES: dict[str, Change] = {
    "a merge without its prefix": bpe(merges=[["a", "\u00e9"]], continuing_subword_prefix="x"),
    "a merge shorter than its prefix": bpe(merges=["a b"], continuing_subword_prefix="\u00e9\u00e9\u00e9"),
    "a prefix that is no text": bpe(continuing_subword_prefix=[1]),
    "a charsmap of 8 GB": charsmap(b"\xff\xff\xff\xff\x03"),
    "a charsmap of 0.5 GB": charsmap((1 << 29).to_bytes(4, "little") + b"\0" * 100),
    "an empty charsmap": charsmap(b""),
    "a charsmap that points outside": charsmap(b"\4\0\0\0\0\0\0\0\0"),
    "a charsmap within a sequence": {"normalizer": {"type": "Sequence", "normalizers": [charsmap(b"")["normalizer"]]}},
    "an empty pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aa"}},
    "chunks of 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a pattern that is none": split("("),
    "a pattern of 10,000 levels": split("(" * 10_000 + ")" * 10_000),
    "no unknown token": {"model": {"type": "WordLevel", "unk_token": "x", "vocab": {"a": 0, "<s>": 1, "</s>": 2}}},
    "an unknown token outside": {"model": {**UNIGRAM, "unk_id": 7, "vocab": [["a", -1.0]]}},
    "no vocabulary": {"model": {**UNIGRAM, "unk_id": None, "vocab": []}},
    "a vocabulary id of 4 billion": bpe(vocab={**TOKENIZER["model"]["vocab"], "c": 4_000_000_000}),
    "a vocabulary id below 0": bpe(vocab={"a": -1}),
    "random merges": bpe(dropout=0.5),
    "no model": {"model": None},
    "a model that is text": {"model": "BPE"},
}


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        build_tokenizer(str(folder))
    (problem,) = caught.value.problems
    assert problem.where == str(folder / "tokenizer.json")
    assert problem.fix
    assert len(caught.value.report) < 2000
    return problem.what


@pytest.mark.parametrize("kind", CHANGES)
def test_what_crashes_the_library_is_refused(tmp_path, kind, capfd):
    content = copy.deepcopy(TOKENIZER) | CHANGES[kind]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    refused(tmp_path)
    assert capfd.readouterr().err == "", "a panic is printed"


BYTES: dict[str, bytes] = {
    "empty": b"",
    "UTF-16": json.dumps(TOKENIZER).encode("utf-16"),
    "200,000 levels": b"[" * 200_000,
    "200,000 levels within": b'{"model": ' + b'{"a":' * 200_000,
    "5,000 digits": json.dumps(TOKENIZER).replace('"b": 2', f'"b": {DIGITS}').encode(),
    "NaN": json.dumps(TOKENIZER).replace('"b": 2', '"b": NaN').encode(),
    "control characters": b'{"model": {"type": "\x1b[2J"}}',
    "a page": b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("read", [tokenizer_facts, build_tokenizer])
def test_bytes_that_are_no_tokenizer(tmp_path, kind, read: Callable[[str], object]):
    (tmp_path / "tokenizer.json").write_bytes(BYTES[kind])
    with pytest.raises(UserError) as caught:
        read(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in caught.value.report
    assert len(caught.value.report) < 2000
    assert not [c for c in caught.value.report if not c.isprintable() and c != "\n"]


RANKS = [bytes([byte]) for byte in range(256)]


def ranks(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"YQ== " + b"9" * 5000 + b"\n", "line 1"),
        (b"YQ== " + b"9" * 4000 + b"\n", "incomplete"),
        (ranks([*RANKS, b"a" * 5000]), "line 257"),
        (ranks([*RANKS[1:], b"ab"]), "1 of the 256 bytes have no rank, 0x00 first"),
        (ranks([*RANKS, b"a"]), "incomplete"),
        (b"\x1b[2J\n", "line 1"),
        (b"\n" * 1000, "SentencePiece"),
    ],
    ids=["5,000 digits", "4,000 digits", "a long token", "a byte is missing", "twice", "control characters", "lines"],
)
def test_ranks_that_are_none(tmp_path, content, says):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        build_tokenizer(str(tmp_path))
    assert str(tmp_path / "tokenizer.model") in caught.value.report


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("read", [tokenizer_facts, build_tokenizer])
def test_sizes_have_limits(tmp_path, name, read):
    """A sparse file: nothing of it is read to know its length."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UserError, match="longer than a tokenizer may be"):
        read(str(tmp_path))


@pytest.mark.parametrize("read", [tokenizer_facts, build_tokenizer])
def test_what_is_no_file_is_no_tokenizer(tmp_path, read):
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "tokenizer.model", tmp_path / ("a" * 300)):
        if read is tokenizer_facts:
            assert tokenizer_facts(str(path)).kind == "missing"
        else:
            with pytest.raises(UserError, match=r"model\.hf_assets_path"):
                build_tokenizer(str(path))


def test_a_warning_of_the_library_is_not_lost(tmp_path):
    """What is written while a tokenizer is opened comes out, if it opens."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    code = (
        "import os, sys, tokenizers\n"
        "from quadriga.data import tokenizer_json\n"
        "encode = tokenizer_json.encode\n"
        "tokenizer_json.encode = lambda *given: (os.write(2, b'a warning'), encode(*given))[1]\n"
        "from pathlib import Path\n"
        "tokenizer_json.open_tokenizer(Path(sys.argv[1]), 'fix')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "a warning")
