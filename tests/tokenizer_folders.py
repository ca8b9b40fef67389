"""Small tokenizer folders, made by hand: bytes as tokens, some special tokens, and any files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

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
