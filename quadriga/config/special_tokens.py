"""Finds the BOS and EOS tokens of a `tokenizer.json` in the files next to it, as transformers 5 does.

For each of BOS and EOS, the first of these sources that has it decides. Null or an empty text means that there is none.

1. `special_tokens_map.json`, unless `tokenizer_config.json` has `added_tokens_decoder`, which replaces it
2. `tokenizer_config.json`
3. the default of its `tokenizer_class`

If no source has either, transformers knows neither. Quadriga then searches the vocabulary for the usual names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import json_type, read_json_object

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
MAX_TOKEN_CHARS = 1000  # characters
ROLES = ("bos_token", "eos_token")

# Defaults of classes of transformers: (BOS, EOS).
CLASS_DEFAULTS: Mapping[str, tuple[str | None, str | None]] = {
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "LlamaTokenizer": ("<s>", "</s>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
}

# The usual names, for a vocabulary without any of these sources.
COMMON_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """BOS and EOS by name; None if there is none. `add_bos`: the value of `add_bos_token`, None if it is not set.

    `raw`: the contents of the files, by name. `guessed`: no file names either token, and these are the usual names that
    the vocabulary has.
    """

    bos: str | None
    eos: str | None
    add_bos: bool | None
    raw: Mapping[str, Mapping[str, Any]]
    guessed: bool


def read_special_tokens(folder: Path, vocabulary: Mapping[str, int], byte_level: bool) -> SpecialTokens:
    """BOS and EOS of a folder's tokenizer.

    Args:
        vocabulary: ids by token, of its `tokenizer.json`.
        byte_level: whether it works on bytes; transformers then ignores the class `LlamaTokenizer`.

    `added_tokens` adds tokens that are named here but not in the vocabulary.

    Raises:
        UserError: a file cannot be read, or a token is not text.
    """
    raw = {name: read_json_object(folder / name) for name in (CONFIG, MAP) if os.path.lexists(folder / name)}
    config = raw.get(CONFIG, {})
    if "added_tokens_decoder" in config:
        raw.pop(MAP, None)
    named: dict[str, str | None] = {}
    for role in ROLES:
        for file in (MAP, CONFIG):
            if role in raw.get(file, {}):
                named[role] = _token(folder / file, role, raw[file][role])
                break
    defaults = _class_defaults(config, byte_level)
    for role, default in zip(ROLES, defaults, strict=True):
        if default in vocabulary:
            named.setdefault(role, default)
    guessed = not named
    if guessed:
        named = {role: next((name for name in COMMON_NAMES[role] if name in vocabulary), None) for role in ROLES}
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise UserError(type_problem(folder / CONFIG, "add_bos_token", add_bos, "true, false"))
    return SpecialTokens(named.get("bos_token"), named.get("eos_token"), add_bos, raw, guessed)


def token_text(value: object) -> str | None:
    """The text of a token, which the files write as text or as an object with `content`; None for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _token(file: Path, role: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    text = token_text(value)
    if text is None or len(text) > MAX_TOKEN_CHARS:
        raise UserError(type_problem(file, role, value, 'a token as text, an object with "content", or null'))
    return text or None


def _class_defaults(config: Mapping[str, Any], byte_level: bool) -> tuple[str | None, str | None]:
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    return (None, None) if name == "LlamaTokenizer" and byte_level else CLASS_DEFAULTS.get(name, (None, None))


def type_problem(file: Path, key: str, value: object, allowed: str) -> Problem:
    return Problem(
        f"{file}, {key}", f"cannot be a JSON {json_type(value)} like this", shortened(value), allowed=allowed
    )
