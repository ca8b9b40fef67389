"""Exported tokenizers load in AutoTokenizer of transformers, with their BOS and EOS and the ids of training."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_folders import byte_level, write_folder

from quadriga.data.builtin import BuiltinSource
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.tokenizer_export import transformers_files

TEXTS = [
    "Hello world, 漢字 and 12345.\n\n  x",
    "it's \u00e9\u00df\x00\x7f",
    " hello   hell 123 or",
    "\U0001f600" * 3,
    "",
]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def exported(folder: Path, assets: str, config: dict[str, Any] | None = None) -> Any:
    """Their tokenizer of an export, which lies beside a model's config.json as `to-hf` leaves it."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)
    for name, content in transformers_files(assets).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(LLAMA | (config or {})))
    return AutoTokenizer.from_pretrained(folder)


def same(theirs: Any, assets: str) -> None:
    ours = build_tokenizer(assets)
    assert (theirs.bos_token_id, theirs.eos_token_id) == ours.special_ids
    assert len(theirs) <= ours.vocab_size
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert theirs(text, add_special_tokens=False).input_ids == ids.tolist(), text


def test_the_built_in_tokenizer(tmp_path):
    theirs = exported(tmp_path / "out", "builtin:bytes")
    same(theirs, "builtin:bytes")
    assert theirs("ab").input_ids == [256, 97, 98]
    for text in TEXTS:
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    again = build_tokenizer(str(tmp_path / "out"))
    assert (again.bos_id, again.eos_id, again.vocab_size) == (256, 257, 258)
    assert [ids.tolist() for ids in again.encode_batch(TEXTS)] == [list(text.encode()) for text in TEXTS]


def test_the_original_file_of_llama_3(tmp_path):
    words = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"12", b"123", "\u00e9".encode(), b"'s"]
    tokens = [*(bytes([byte]) for byte in reversed(range(256))), *words, b"xyz", b"never reached"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    theirs = exported(tmp_path / "out", str(tmp_path))
    same(theirs, str(tmp_path))
    assert theirs("xyz hello").input_ids[0] == len(tokens)
    assert len(theirs) == len(tokens) + 256
    assert build_tokenizer(str(tmp_path / "out")).special_ids == build_tokenizer(str(tmp_path)).special_ids


BYTES = byte_level()
STRIP = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}},
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}},
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}},
        {"tokenizer_config": {"bos_token": "</s>", "eos_token": "</s>", "tokenizer_class": "Custom"}},
        {"tokenizer_config": {"bos_token": None, "eos_token": "</s>", "add_bos_token": False}},
        {"tokenizer_config": {"eos_token": {"content": "</s>", **STRIP}, "bos_token": "<s>"}},
        {"tokenizer_config": {}, "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}},
        {"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        {"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": 3}},
        {},
        {"special_tokens_map": {"eos_token": "</s>", "pad_token": "<pad that is not there>"}},
        {"tokenizer_config": {"eos_token": "</s>", "pad_token": "<s>", "additional_special_tokens": ["<s>", "new"]}},
        {"tokenizer_config": {"eos_token": "</s>", "unk_token": 3, "model_max_length": "many", "padding_side": "up"}},
        {"tokenizer_config": {"eos_token": "</s>", "extra_special_tokens": {"image_token": "<img>"}}},
        {"tokenizer_config": {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}},
        {"tokenizer_config": {"eos_token": "</s>"}, "added_tokens": {"<new>": 260}},
    ],
)  # fmt: skip
def test_folders_of_every_kind(tmp_path, files):
    assets = str(write_folder(tmp_path / "assets", BYTES, **files))
    theirs = exported(tmp_path / "out", assets)
    same(theirs, assets)
    assert len(theirs) == build_tokenizer(assets).vocab_size, "transformers added a token"


def test_a_file_of_another_name_and_what_is_kept(tmp_path):
    config = {"eos_token": "</s>", "chat_template": "{{ messages }}", "model_max_length": 77, "padding_side": "left"}
    folder = write_folder(tmp_path / "assets", BYTES, tokenizer_config={**config, "pad_token": "<s>"})
    (folder / "tokenizer.json").rename(folder / "mine.json")
    (folder / "merges.txt").write_text("a b")
    theirs = exported(tmp_path / "out", str(folder / "mine.json"))
    same(theirs, str(folder / "mine.json"))
    assert (theirs.chat_template, theirs.model_max_length, theirs.pad_token) == ("{{ messages }}", 77, "<s>")
    assert theirs.padding_side == "left"
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"


def test_several_chat_templates_are_kept(tmp_path):
    both = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = write_folder(tmp_path / "assets", BYTES, tokenizer_config={"eos_token": "</s>", "chat_template": both})
    assert exported(tmp_path / "list", str(folder)).chat_template == {"default": "a", "tool_use": "b"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("c")
    (folder / "chat_template.jinja").write_text("d")
    assert exported(tmp_path / "files", str(folder)).chat_template == {"default": "d", "rag": "c"}


def test_a_trained_tokenizer(tmp_path):
    """One with merges, which adds BOS by itself."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = (str(record.data) for record in BuiltinSource(held_out=True).read(0))
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "assets").mkdir()
    bpe.save(str(tmp_path / "assets" / "tokenizer.json"))
    theirs = exported(tmp_path / "out", str(tmp_path / "assets"))
    same(theirs, str(tmp_path / "assets"))
    assert theirs("a").input_ids[0] == 0
