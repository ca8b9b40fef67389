"""Shards of `quadriga tokenize` as token files: the manifest is checked at opening, the bytes by `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_writers import write_shards
from tokenizer_folders import TOKENIZER

from quadriga.config.schema import Dataloader, TokenKeys
from quadriga.data.shards import MANIFEST, read_manifest
from quadriga.data.token_data import open_tokens
from quadriga.data.token_files import open_token_files
from quadriga.data.unfinished import WORK
from quadriga.errors import Problem, UserError

SHARDS = [[[256, 1, 2, 257], [], [256, 257]], [[256, 9, 8, 7, 257]]]
KEYS = TokenKeys("training", "", "auto", None, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, SHARDS)
    return tmp_path


def refused(path: Path, **options) -> Problem:
    with pytest.raises(UserError) as caught:
        open_token_files(str(path), **options)
    (problem,) = caught.value.problems
    return problem


def change(folder: Path, **entries: object) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | entries))


def test_the_manifest_is_read_back(folder):
    manifest = read_manifest(folder)
    assert (manifest.ids, manifest.documents, dict(manifest.lengths)) == (11, 4, {4: 2, 0: 1, 2: 1})
    assert manifest.as_json() == json.loads((folder / MANIFEST).read_text())
    assert open_token_files(str(folder)).made_by == manifest.tokenizer


def test_one_shard_can_be_read_alone(folder):
    for path in (folder / "00001.bin", folder / "00001.idx", folder / "00001"):
        tokens = open_token_files(str(path))
        assert tokens.read(0, 5).tolist() == [256, 9, 8, 7, 257]
        assert tokens.documents(0, 5) == ((0, 0),)


def test_uint32_is_read(tmp_path):
    write_shards(tmp_path, [[[70_000, 3]]], "uint32")
    assert open_token_files(str(tmp_path)).read(0, 2).tolist() == [70_000, 3]
    assert "the file says that its ids are uint32" in refused(tmp_path, token_dtype="uint16").what


@pytest.mark.parametrize(
    "damage",
    [
        {"dtype": "int8"},
        {"ids": 12},
        {"documents": -1},
        {"bad_records": True},
        {"shards": {}},
        {"shards": [7]},
        {"tokenizer": None},
        {"document_lengths": {"1": 9}},
        {"document_lengths": {"9" * 5000: 4}},
        {"source": []},
        {"more": 1},
    ],
)
def test_a_damaged_manifest_is_refused(folder, damage):
    change(folder, **damage)
    problem = refused(folder)
    assert problem.where == str(folder / MANIFEST)
    assert "the manifest is damaged: " in problem.what


def test_another_version_is_refused(folder):
    change(folder, version=2)
    assert "is of version 2" in refused(folder).what


def test_a_manifest_of_another_program_is_none(folder):
    change(folder, format="webdataset")
    assert read_manifest(folder) is None
    for index in folder.glob("*.idx"):
        index.unlink()
    with pytest.raises(UserError, match="the file has no header"):
        open_token_files(str(folder))


def test_files_that_do_not_fit_the_manifest_are_refused(folder):
    (folder / "00002.bin").write_bytes(b"12")
    assert "is not in the manifest of its folder" in refused(folder).what
    (folder / "00002.bin").unlink()
    (folder / "00001.bin").write_bytes(b"12")
    assert f"has 2 bytes; {MANIFEST} states 10" in refused(folder).what
    (folder / "00001.bin").unlink()
    (folder / "00001.idx").unlink()
    assert "the shard is missing" in refused(folder).what
    assert open_token_files(str(folder / "*.bin")).length == 6  # a glob names a part of the data
    (folder / "00000.idx").write_bytes(bytes(24))
    tokens = open_token_files(str(folder / "00000.bin"))
    assert "its last document ends at 0 of 6 ids" in next(tokens.verify(258)).what
    with pytest.raises(UserError, match="the index is damaged: no document has id 5"):
        tokens.documents(0, 6)
    (folder / "00000.idx").unlink()
    assert "its index 00000.idx is missing" in refused(folder / "00000.bin").what


def test_a_job_that_is_not_finished_is_no_data(folder):
    (folder / MANIFEST).unlink()
    (folder / WORK).mkdir()
    for _ in range(2):
        problem = refused(folder)
        assert "are not complete" in problem.what
        assert "run the same" in str(problem.fix)
        for path in folder.glob("0*"):  # before the first shard is finished
            path.unlink()


def test_changed_bytes_are_found_by_their_hash(folder):
    assert not list(open_token_files(str(folder)).verify(258))
    content = bytearray((folder / "00000.bin").read_bytes())
    content[2] ^= 3
    (folder / "00000.bin").write_bytes(content)
    (found,) = open_token_files(str(folder)).verify(258)
    assert found.where == str(folder / "00000.bin")
    assert "its bytes are not those" in found.what


def test_a_damaged_index_is_found(folder):
    (folder / "00000.idx").write_bytes(bytes([5, *bytes(7), 4, *bytes(7), 6, *bytes(7)]))
    tokens = open_token_files(str(folder))
    found = [problem.what for problem in tokens.verify(258)]
    assert "the index is damaged: document 1 ends before the one before it" in found[0]
    assert "its bytes are not those" in found[1]
    with pytest.raises(UserError, match="the index is damaged"):
        tokens.documents(0, 6)


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path_factory):
    first = open_token_files(str(folder)).fingerprint
    other = tmp_path_factory.mktemp("other")
    write_shards(other, SHARDS)
    assert open_token_files(str(other)).fingerprint == first
    write_shards(other, [SHARDS[0], [[256, 9, 8, 6, 257]]])  # of the same sizes
    assert open_token_files(str(other)).fingerprint != first


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    for name in ("bytes", "json:12"):
        (tmp_path / name.partition(":")[0]).mkdir()
        write_shards(tmp_path / name.partition(":")[0], SHARDS, tokenizer=name)
    assert "made by several tokenizers: bytes, json:12" in refused(tmp_path).what


def test_the_tokenizer_of_a_run_is_that_of_the_shards(folder, tmp_path_factory):
    keys = KEYS._replace(path=str(folder))
    assert open_tokens(keys, Dataloader(), 4, 258, assets="builtin:bytes")[0].length == 11
    assert open_tokens(keys, Dataloader(), 4, 258)[0].length == 11
    other = tmp_path_factory.mktemp("tokenizer")
    (other / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (other / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(UserError) as caught:
        open_tokens(keys, Dataloader(), 4, 258, assets=str(other))
    (problem,) = caught.value.problems
    assert problem.where == "model.hf_assets_path"
    assert "is not the tokenizer of the shards" in problem.what
