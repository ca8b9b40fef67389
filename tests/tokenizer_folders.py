"""Small tokenizer folders, made by hand: bytes as tokens, some special tokens, and any files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# A `tokenizer.json` that has one of everything.
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    },
    "added_tokens": [{"id": 5, "content": "<s>", **SPECIAL}, {"id": 6, "content": "</s>", **SPECIAL}],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
            {"type": "Prepend", "prepend": "a"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4},
        "merges": [["a", "b"], ["ab", "a"]],
    },
}
SPECIALS = ("<s>", "</s>", "<|im_end|>", "<|endoftext|>")


def byte_level(specials: Sequence[str] = SPECIALS, begins_with: str | None = None) -> dict[str, Any]:
    """A `tokenizer.json`: 256 bytes, then the special tokens; a post-processor that puts one before a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    if begins_with:
        token = (begins_with, tokenizer.token_to_id(begins_with))
        single = f"{begins_with} $A"
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[token])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def write_folder(folder: Path, tokenizer: Mapping[str, Any], **files: Any) -> Path:
    """`tokenizer_config=...`, `special_tokens_map=...`: JSON files of these names; None: no file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"tokenizer": tokenizer, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
