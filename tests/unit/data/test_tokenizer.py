"""Tokenizers: real files of each format, made here; ids equal to what the libraries give; special tokens stay out."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from quadriga.data.builtin import BuiltinSource
from quadriga.data.tokenizer import LLAMA3_SPLIT, LONGEST_PIECE, ByteTokenizer, build_tokenizer
from quadriga.errors import UserError

TEXTS = ["Hello world, 漢字 and 12345.\n\n  x", "", "<s> is text</s><|begin_of_text|>", "\u00e9" * 50]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """A tokenizer.json trained here, which adds BOS by itself, truncates and pads: none of which may reach training."""
    folder = tmp_path_factory.mktemp("json")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = BuiltinSource(held_out=True)
    bpe.train_from_iterator((str(record.data) for shard in range(20) for record in source.read(shard)), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(5)
    bpe.enable_padding(length=9, pad_id=2, pad_token="<pad>")
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory):
    """A tokenizer.model: 256 bytes and a few merges, in tiktoken's format."""
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"12", b"123"]
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_bytes():
    tokenizer = build_tokenizer("builtin:bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    ids = tokenizer.encode_batch(TEXTS)
    assert [bytes(array.tolist()).decode() for array in ids] == TEXTS
    assert all(array.dtype == np.int32 for array in ids)


def test_json_gives_the_ids_of_the_library_without_marks_padding_or_truncation(json_folder):
    plain = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    tokenizer = build_tokenizer(str(json_folder))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == plain.get_vocab_size()
    texts = [TEXTS[0], TEXTS[1], TEXTS[3]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids
        assert plain.decode(ids.tolist()) == text


def test_json_encodes_spelled_special_tokens_as_text(json_folder):
    plain = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    tokenizer = build_tokenizer(str(json_folder))
    (ids,) = tokenizer.encode_batch(["a <s> b</s>"])
    assert not set(ids.tolist()) & {0, 1, 2}
    assert plain.decode(ids.tolist()) == "a <s> b</s>"


def test_names_in_the_configuration_win(json_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "</s>"}, "eos_token": "<pad>"}))
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.fingerprint != build_tokenizer(str(json_folder)).fingerprint
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<none>"}))
    added = build_tokenizer(str(tmp_path))
    assert (added.bos_id, added.eos_id, added.vocab_size) == (None, tokenizer.vocab_size, tokenizer.vocab_size + 1)


def test_a_tokenizer_without_marks_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="neither a BOS nor an EOS") as caught:
        build_tokenizer(str(tmp_path))
    assert "create tokenizer_config.json and set bos_token and eos_token in" in caught.value.report
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="neither a BOS nor an EOS") as caught:
        build_tokenizer(str(tmp_path))
    assert "to do: set bos_token and eos_token in tokenizer_config.json" in caught.value.report


def test_ranks_give_the_ids_of_tiktoken(ranks_file):
    tokenizer = build_tokenizer(str(ranks_file))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (265, 266, 265 + 256)
    content = ranks_file.read_text().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(content[::2], content[1::2], strict=True)}
    plain = tiktoken.Encoding("test", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == plain.encode_ordinary(text)
        assert plain.decode(ids.tolist()) == text
    assert tokenizer.encode_batch(["hello world 123"])[0].tolist() == [259, 262, 108, 100, 32, 264]


def test_ranks_survive_endless_words(ranks_file):
    """Without cuts, a word of a million letters takes tiktoken minutes, or the stack."""
    tokenizer = build_tokenizer(str(ranks_file))
    text = "y" * 1_000_000 + " " * (2 * LONGEST_PIECE + 5) + "end"
    (ids,) = tokenizer.encode_batch([text])
    assert bytes(ids.tolist()).decode() == text


def test_the_folder_of_the_hub_is_searched_in_order(json_folder, ranks_file, tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    (original / "tokenizer.model").write_bytes(ranks_file.read_bytes())
    assert build_tokenizer(str(tmp_path)).fingerprint == build_tokenizer(str(ranks_file)).fingerprint
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    assert build_tokenizer(str(tmp_path)).fingerprint == build_tokenizer(str(json_folder)).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00", "SentencePiece"),
        ("tokenizer.model", b"aGU= 0\nnot base64 at all\n", r"tokenizer\.model, line 2"),
        ("tokenizer.model", b"aGU= 0\nbGw= 7\n", "incomplete"),
        ("tokenizer.json", b'{"version": "1.0"', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("notes.txt", b"x", r"the folder has no tokenizer; it contains notes\.txt"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build_tokenizer(str(tmp_path))
    assert caught.value.problems[0].fix


def test_a_missing_path_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"download_hf_assets\.py"):
        build_tokenizer(str(tmp_path / "nothing"))


@given(st.text())
def test_bytes_round_trip(text):
    (ids,) = ByteTokenizer().encode_batch([text])
    assert ids.astype(np.uint8).tobytes().decode() == text
