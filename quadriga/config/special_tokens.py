"""Which tokens begin and end a text, as transformers 5 reads the files beside a `tokenizer.json`.

For each of BOS and EOS the first of these that says something decides; null or an empty text says: none.

1. `special_tokens_map.json`, unless `tokenizer_config.json` has `added_tokens_decoder`, which makes it obsolete
2. `tokenizer_config.json`
3. the default of its `tokenizer_class`

Where nothing is said of either, transformers knows neither. Then the usual names are looked for in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import json_type, read_json_object

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
MAX_TOKEN_CHARS = 1000  # characters
ROLES = ("bos_token", "eos_token")

# What classes of transformers take where no file says anything: (BOS, EOS).
CLASS_DEFAULTS: Mapping[str, tuple[str | None, str | None]] = {
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "LlamaTokenizer": ("<s>", "</s>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
}

# The usual names, for a vocabulary of which no file says anything.
COMMON_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """BOS and EOS by name, None where there is none. `add_bos`: what `add_bos_token` says, None where nothing.

    `raw`: the files that were read, by name; `guessed`: no file names any, and these are the usual names, if the
    vocabulary has them.
    """

    bos: str | None
    eos: str | None
    add_bos: bool | None
    raw: Mapping[str, Mapping[str, Any]]
    guessed: bool


def read_special_tokens(folder: Path, vocabulary: Mapping[str, int], byte_level: bool) -> SpecialTokens:
    """What the files of a folder say of BOS and EOS.

    Args:
        vocabulary: ids by token, of the `tokenizer.json` there.
        byte_level: whether that works on bytes; transformers then ignores `LlamaTokenizer` as its class.

    A token that is named and not in the vocabulary is one of those that `added_tokens` adds.

    Raises:
        UserError: a file cannot be read, or a token is no text.
    """
    raw = {name: read_json_object(folder / name) for name in (CONFIG, MAP) if (folder / name).is_file()}
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
    """A token as it is written in these files, as text or as an object with `content`; None for anything else."""
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
