"""What is known of tokenizers and data without opening them with a library; it agrees with those that do."""

from __future__ import annotations

import base64
import errno
import fnmatch
import itertools
import json
import os
from pathlib import Path

import pytest

from quadriga.config.assets import DATASETS, data_files, missing_files, tokenizer_facts
from quadriga.data.files import find_files
from quadriga.data.token_files import open_token_files
from quadriga.errors import UserError
from quadriga.file_search import _matches

VOCAB = {"a": 0, "b": 1, "c": 2}


def test_bytes_are_built_in():
    facts = tokenizer_facts("builtin:bytes")
    assert (facts.kind, facts.vocab_size) == ("bytes", 258)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"model": {"vocab": VOCAB}}, 3),
        ({"model": {"vocab": VOCAB}, "added_tokens": [{"id": 9, "content": "<s>"}]}, 10),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 2),
    ],
)
def test_a_hugging_face_tokenizer_is_counted_by_its_largest_id(content, size, write):
    write(json.dumps(content), "tok/tokenizer.json")
    for path in ("tok", "tok/tokenizer.json"):
        facts = tokenizer_facts(path)
        assert (facts.kind, facts.vocab_size, facts.path) == ("huggingface", size, "tok/tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.model", "original/tokenizer.model"])
def test_a_tiktoken_file_is_counted_by_its_lines(name, write):
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    write("\n".join(lines), f"tok/{name}")
    facts = tokenizer_facts("tok")
    assert (facts.kind, facts.vocab_size) == ("tiktoken", 256 + 256)


def test_tokenizer_json_is_preferred(write):
    write("", "tok/tokenizer.model")
    write(json.dumps({"model": {"vocab": VOCAB}}), "tok/tokenizer.json")
    assert tokenizer_facts("tok").kind == "huggingface"


def test_what_is_not_there_is_missing():
    facts = tokenizer_facts("none/at/all")
    assert (facts.kind, facts.vocab_size) == ("missing", None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"model": {"vocab": {}}}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.model", "\x0a\x0e\x0a\x05<unk>"),
        ("tokenizer.model", ""),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(name, content, write, refusal):
    write(content, f"tok/{name}")
    with pytest.raises(UserError) as caught:
        tokenizer_facts("tok")
    assert caught.value.problems[0].where == f"tok/{name}"
    (problem,) = refusal("--model.hf_assets_path", "tok", training=False)  # also in a dry run: it is there, but wrong
    assert "not a tokenizer" in problem.what


def test_files_are_found_by_path_folder_and_glob(write):
    for name in ("a.jsonl", "sub/b.jsonl.gz", "c.txt", ".hidden.jsonl", "d.parquet", "sub/.cache/e.jsonl"):
        write("x", f"data/{name}")
    assert data_files("jsonl", "data") == [Path("data/a.jsonl"), Path("data/sub/b.jsonl.gz")]
    assert data_files("text", "data/c.txt") == [Path("data/c.txt")]
    assert data_files("text", "data/*.txt") == [Path("data/c.txt")]
    assert data_files("jsonl", "data/**/*.gz") == [Path("data/sub/b.jsonl.gz")]
    assert data_files("parquet", "data/sub") == []


PARTS = [["**"], ["**", "x"], ["**", "a", "**"], ["**", "**", "?"], ["**", "[ab]", "**", "x"], ["**", "*", "*"]]


@pytest.mark.parametrize("parts", PARTS, ids="/".join)
def test_a_glob_with_folders_of_any_depth_matches_as_its_definition(parts):
    def matches(names: list[str], parts: list[str]) -> bool:
        if not parts:
            return not names
        if parts[0] == "**":
            return any(matches(names[start:], parts[1:]) for start in range(len(names) + 1))
        return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches(names[1:], parts[1:])

    for depth in range(5):
        for names in itertools.product("abx", repeat=depth):
            assert _matches(list(names), parts) == matches(list(names), parts)


def test_a_deep_glob_takes_little_time(write):
    path = "/".join(["a"] * 40)
    write("x", f"data/{path}/b.jsonl")
    assert data_files("jsonl", "data/" + "**/" * 40 + "*.jsonl") == [Path(f"data/{path}/b.jsonl")]
    assert data_files("jsonl", "data/" + "**/a/" * 20 + "*.jsonl") == [Path(f"data/{path}/b.jsonl")]
    assert data_files("jsonl", "data/" + "**/" * 40 + "*.json") == []


def test_a_path_below_a_folder_without_access_is_refused(tmp_path, monkeypatch):
    """The system's answers to a user who is not root."""
    access, closed = os.access, tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)

    def refusing(stat):
        def refuse(path, *arguments, **options):
            if isinstance(path, str | Path) and str(path).startswith(f"{closed}/"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return stat(path, *arguments, **options)

        return refuse

    monkeypatch.setattr(os, "stat", refusing(os.stat))
    monkeypatch.setattr(os, "lstat", refusing(os.lstat))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    for dataset in ("text", "tokens"):
        for name in ("inner", "inner/a.bin", "a.idx", "a"):
            problem = missing_files("training.dataset", dataset, f"{closed}/{name}", None)
            assert problem.what == f"there is no access to the folder {closed}"
    for read in (open_token_files, lambda path: find_files("text", path)):
        with pytest.raises(UserError, match="there is no such file or folder"):
            read(f"{closed}/inner/a")


def test_a_folder_without_such_files_is_distinguished_from_none(write):
    write("x", "data/notes.txt")
    there = missing_files("training.dataset", "parquet", "data", "run.toml, line 3")
    assert "holds no file that parquet reads" in there.what
    assert there.allowed == "*.parquet"
    nowhere = missing_files("training.dataset", "text", "dat", None)
    assert nowhere.what == "nothing is there"
    assert nowhere.nearest == "data"


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, kind in (("pipe", "a FIFO"), ("link", "a link that leads nowhere")):
        problem = missing_files("training.dataset", "text", str(tmp_path / name), None)
        assert (problem.what, problem.nearest) == (f"is {kind}, not a file or a folder", None)


def test_validation_data_is_looked_for_too(write, refusal):
    (problem,) = refusal(write('[validation]\nenable = true\ndataset = "text"\ndataset_path = "held/*.txt"\nsteps = 2'))
    assert problem.where == "validation.dataset_path"
    assert problem.source == "run.toml, line 4"


def test_the_suffixes_are_those_that_data_reads(tmp_path):
    files = pytest.importorskip("quadriga.data.files")
    for kind in ("text", "jsonl", "parquet"):
        for suffix in DATASETS[kind].suffixes:
            (tmp_path / kind / f"x{suffix}").parent.mkdir(exist_ok=True)
            (tmp_path / kind / f"x{suffix}").write_text("x")
        found = {file.path for file in files.find_files(kind, str(tmp_path / kind))}
        assert found == set(data_files(kind, str(tmp_path / kind)))
        assert len(found) == len(DATASETS[kind].suffixes)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("./assets/hf/Llama-3.1-8B", "download_hf_assets.py --repo_id meta-llama/Llama-3.1-8B --local_dir assets/hf"),
        ("hf/Llama-3.2-1B", "download_hf_assets.py --repo_id meta-llama/Llama-3.2-1B --local_dir hf"),
        ("tok", "put one there"),
    ],
)
def test_a_missing_tokenizer_comes_with_the_command_that_fetches_it(path, command, refusal):
    (problem,) = refusal("--model.hf_assets_path", path)
    assert command in problem.fix
