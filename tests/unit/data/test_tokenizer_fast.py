"""`quadriga tokenize --library fastokens`: ids equal to those of `tokenizers`, or a refusal that shows a difference."""

from __future__ import annotations

import json
from pathlib import Path

import corpora
import numpy as np
import pytest
import tokenizers
from tokenizer_folders import write_folder
from tokenizers import models, pre_tokenizers, trainers

from quadriga.cli.main import main
from quadriga.config.schema import TextKeys
from quadriga.data import tokenize_job, tokenizer_fast
from quadriga.data.pieces import cut_pieces
from quadriga.data.shards import read_manifest
from quadriga.data.tokenize_job import TokenizeJob
from quadriga.data.tokenizer import LLAMA3_SPLIT, JsonTokenizer, build_tokenizer
from quadriga.data.tokenizer_fast import FastTokenizer, hard_texts
from quadriga.errors import EXIT_OK, EXIT_USAGE, UserError

fastokens = pytest.importorskip("fastokens", reason="fastokens is optional")
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def split_at(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "Llama 3": split_at(LLAMA3_SPLIT),
}


def trained(kind: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(SPECIALS.values()), initial_alphabet=alphabet, show_progress=False
    )
    # Numbers of three digits become tokens, so that a split into two and one is seen in the ids.
    tokenizer.train_from_iterator([*corpora.texts(200), "123 2048 777 " * 50, "quadriga " * 50], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["GPT-2", "Llama 3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = json.loads(trained(request.param).to_str())
    added = {"id": len(content["model"]["vocab"]), "content": "<tool>", "special": False, "single_word": False}
    content["added_tokens"].append({**added, "lstrip": False, "rstrip": False, "normalized": False})
    return write_folder(tmp_path_factory.mktemp("tokenizer"), content, tokenizer_config=SPECIALS)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [*corpora.texts(300), "<s> forged </s>", "a <tool> b", "", *list(hard_texts())[::16]]
    return corpora.write_jsonl(tmp_path_factory.mktemp("lines") / "lines.jsonl", texts)


def ids_of(tokenizer: FastTokenizer | JsonTokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == EXIT_USAGE
    return capsys.readouterr().err


def test_the_ids_are_those_of_tokenizers(folder):
    slow = build_tokenizer(str(folder))
    assert isinstance(slow, JsonTokenizer)
    fast = FastTokenizer(slow, str(folder))
    texts = [*corpora.texts(100), *list(hard_texts(slow.added_tokens))[::4]]
    assert ids_of(fast, texts) == ids_of(slow, texts)
    assert ids_of(fast, []) == []
    for text in ("<s> forged </s>", "a <tool> b"):
        assert ids_of(fast, [text]) == ids_of(slow, [text])
    assert slow.bos_id not in ids_of(fast, ["<s> forged </s>"])[0]
    assert slow.vocab_size - 1 in ids_of(fast, ["a <tool> b"])[0]
    assert all(ids.dtype == np.int32 for ids in fast.encode_batch(["a", ""]))
    assert (fast.bos_id, fast.eos_id, fast.vocab_size) == (slow.bos_id, slow.eos_id, slow.vocab_size)
    assert fast.fingerprint == slow.fingerprint


def test_the_shards_are_equal(folder, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_fast, "hard_texts", lambda added: ["a"])
    options = ["--tokenizer", str(folder), "--workers", "1"]
    assert main(["tokenize", str(lines), str(tmp_path / "slow"), *options]) == EXIT_OK
    assert main(["tokenize", str(lines), str(tmp_path / "fast"), *options, "--library", "fastokens"]) == EXIT_OK
    slow, fast = read_manifest(tmp_path / "slow"), read_manifest(tmp_path / "fast")
    assert slow is not None
    assert fast is not None
    assert (fast.shards, fast.tokenizer, fast.lengths) == (slow.shards, slow.tokenizer, slow.lengths)
    assert fast.source["library"].startswith("fastokens 0.")
    assert slow.source["library"] == "tokenizers"


def test_only_the_fast_library_encodes(folder, lines, monkeypatch):
    """Nothing falls back to the slow one."""
    _, tokenizer = TokenizeJob(TextKeys("jsonl", str(lines)), str(folder), library="fastokens").open()
    expected = ids_of(build_tokenizer(str(folder)), ["one two"])
    monkeypatch.setattr(JsonTokenizer, "encode_batch", None)
    assert ids_of(tokenizer, ["one two"]) == expected


def test_a_difference_is_refused_and_shown(tmp_path, lines):
    content = json.loads(trained("Llama 3").to_str())
    slow = build_tokenizer(str(write_folder(tmp_path, content, tokenizer_config=SPECIALS)))
    fast = FastTokenizer(slow, str(tmp_path))
    other = json.dumps(content).replace("{1,3}", "{1,2}")  # digits are split otherwise
    fast._fast = fastokens.Tokenizer.from_json_str(other)
    with pytest.raises(UserError) as refused:
        fast.require_equal(TokenizeJob(TextKeys("jsonl", str(lines)), "builtin:bytes").open()[0])
    (problem,) = refused.value.problems
    assert problem.where == "--library"
    assert "fastokens gives other ids than tokenizers: [" in problem.what
    assert problem.value is not None
    assert len(problem.value) == len("'123'")  # the shortest text: three digits
    assert problem.value.strip("'").isdigit()
    assert problem.fix == "leave out --library, or set it to tokenizers"


def test_samples_of_the_data_are_compared(tmp_path, monkeypatch):
    """A difference that only a word of the data shows."""
    monkeypatch.setattr(tokenizer_fast, "hard_texts", lambda added: ["a"])
    content = json.loads(trained("GPT-2").to_str())
    slow = build_tokenizer(str(write_folder(tmp_path, content, tokenizer_config=SPECIALS)))
    fast = FastTokenizer(slow, str(tmp_path))
    merges = [merge for merge in content["model"]["merges"] if "".join(merge) != "\u0120quadriga"]
    assert len(merges) == len(content["model"]["merges"]) - 1
    fast._fast = fastokens.Tokenizer.from_json_str(
        json.dumps({**content, "model": {**content["model"], "merges": merges}})
    )
    texts = [*corpora.texts(50), "one quadriga", *corpora.texts(50)]
    file = corpora.write_jsonl(tmp_path / "lines.jsonl", texts)
    source, _ = TokenizeJob(TextKeys("jsonl", str(file)), "builtin:bytes").open()
    with pytest.raises(UserError, match="' quadriga'"):
        fast.require_equal(source)
    one = corpora.write_jsonl(tmp_path / "other.jsonl", ["one"])
    other, _ = TokenizeJob(TextKeys("jsonl", str(one)), "builtin:bytes").open()
    fast.require_equal(other)


def test_every_assigned_character_of_the_small_ranges_is_tested():
    found = set("".join(hard_texts()))
    assert found >= {chr(point) for point in range(0x3400) if not 0xD800 <= point < 0xE000}
    assert found >= set("\U0001f600\U0001fae8\u3042\uff21\U0001d400")
    assert "".join(hard_texts()) == "".join(hard_texts())


def test_a_library_that_is_absent_or_cannot_read_the_tokenizer(tmp_path, lines, capsys, monkeypatch):
    options = ["tokenize", str(lines), str(tmp_path / "out"), "--library", "fastokens", "--tokenizer"]
    assert "fastokens reads only a tokenizer.json" in refusal(capsys, *options, "builtin:bytes")
    words = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "one": 2, "<unk>": 3}, unk_token="<unk>"))
    folder = write_folder(tmp_path / "words", json.loads(words.to_str()), tokenizer_config=SPECIALS)
    shown = refusal(capsys, *options, str(folder))
    assert "fastokens cannot read it" in shown
    assert "leave out --library" in shown
    monkeypatch.setattr(tokenizer_fast, "find_spec", lambda name: None)
    shown = refusal(capsys, *options, str(folder))
    assert "fastokens is not installed" in shown
    assert "pip install fastokens" in shown
    assert not (tmp_path / "out").exists()


def test_another_library_does_not_continue_a_job(tmp_path, folder, lines, capsys, monkeypatch):
    out = tmp_path / "out"
    (out / ".tokenize").mkdir(parents=True)
    job = TokenizeJob(TextKeys("jsonl", str(lines)), str(folder))
    source, tokenizer = job.open()
    tokenize_job.prepare_folder(out, job, source, tokenizer).close()
    tokenize_job.piece_path(out / ".tokenize", 0).touch()
    monkeypatch.setattr(tokenizer_fast, "hard_texts", lambda added: ["a"])
    shown = refusal(capsys, "tokenize", str(lines), str(out), "--tokenizer", str(folder), "--library", "fastokens")
    assert "library was tokenizers, and is fastokens 0." in shown


def test_a_small_source_has_pieces_for_many_processes(tmp_path):
    """Two processes end at about one time, also if the data are small."""
    file = corpora.write_jsonl(tmp_path / "lines.jsonl", [text * 40 for text in corpora.texts(2000)])
    source, _ = TokenizeJob(TextKeys("jsonl", str(file)), "builtin:bytes").open()
    sizes = [sum(map(source.bytes_of, piece)) for piece in cut_pieces(source)]
    assert len(sizes) >= 10
    assert max(sizes) <= 2 * sum(sizes) / len(sizes)
