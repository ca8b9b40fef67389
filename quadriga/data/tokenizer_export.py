"""The files of a tokenizer for `AutoTokenizer` of transformers, which then gives the same ids as in training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from quadriga import limits
from quadriga.config.added_tokens import MORE_TOKENS, OTHER_ROLES
from quadriga.config.assets import BUILTIN_TOKENIZER, TIKTOKEN_SPECIALS
from quadriga.config.special_tokens import CONFIG, MAP, token_text
from quadriga.config.tokenizer_files import is_json
from quadriga.data.tokenizer import FETCH, LLAMA3_SPLIT, read_ranks, tokenizer_file
from quadriga.data.tokenizer_json import open_tokenizer
from quadriga.reading import read_bytes, read_text

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"  # of Llama 3, and of the built-in tokenizer
# This class uses tokenizer.json unchanged; the tokenizer classes of models build their own around the vocabulary.
CLASS = "PreTrainedTokenizerFast"
COPIED_FILES = ("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt")  # copied if they exist
COPIED_KEYS: Mapping[str, type] = {
    "clean_up_tokenization_spaces": bool,
    "model_max_length": int,
}


def transformers_files(hf_assets_path: str) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and the other files of a tokenizer: contents by name.

    Tokens that files next to the source's `tokenizer.json` add are written into it. The configuration names BOS and
    EOS, and no token that is not in the vocabulary, because transformers would add it.
    Raises UserError like `build_tokenizer`.
    """
    if hf_assets_path == BUILTIN_TOKENIZER:
        tokenizer = _byte_level({bytes([byte]): byte for byte in range(256)}, (BOS, EOS), split=None)
        return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), CONFIG: _config(BOS, EOS, {}, {})}
    path = tokenizer_file(hf_assets_path)
    if not is_json(path):
        content = read_bytes(path, limits.RANKS_BYTES, what="tokenizer")
        others = (f"<|reserved_special_token_{number}|>" for number in range(TIKTOKEN_SPECIALS - 2))
        tokenizer = _byte_level(read_ranks(path, content), (BOS, EOS, *others), split=LLAMA3_SPLIT)
        files = {"tokenizer.json": tokenizer.to_str().encode(), CONFIG: _config(BOS, EOS, {}, {})}
        return {**files, "tokenizer.model": content}
    _, read = open_tokenizer(path, FETCH)
    extended, tokens = read.extended, read.tokens
    source_config = {**tokens.raw.get(CONFIG, {}), **tokens.raw.get(MAP, {})}
    as_read = read.content.removeprefix(b"\xef\xbb\xbf")
    whole = json.dumps(extended.document, ensure_ascii=False).encode()
    beside = {name: path.parent / name for name in COPIED_FILES if os.path.lexists(path.parent / name)}
    more = sorted((path.parent / "additional_chat_templates").glob("*.jinja"))
    if more:  # as a list in the configuration, because an export is a flat folder; files override the configuration
        default = beside.pop("chat_template.jinja", None)
        templates = {"default": default} if default else {}
        templates |= {file.name.removesuffix(".jinja"): file for file in more}
        texts = {name: read_text(file, limits.TOKENIZER_BYTES) for name, file in templates.items()}
        source_config["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    return {
        "tokenizer.json": whole if extended.added or extended.changed else as_read,
        CONFIG: _config(tokens.bos, tokens.eos, source_config, extended.vocabulary),
        **{name: read_bytes(file, limits.TOKENIZER_BYTES, what="file of a tokenizer") for name, file in beside.items()},
    }


def _config(bos: str | None, eos: str | None, source_config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bytes:
    """The text of `tokenizer_config.json`. `source_config`: the values of the source's files; only those that
    transformers accepts are kept."""
    config: dict[str, Any] = {
        key: source_config[key] for key, kind in COPIED_KEYS.items() if type(source_config.get(key)) is kind
    }
    if _is_chat_template(template := source_config.get("chat_template")):
        config["chat_template"] = template
    config |= {
        key: source_config[key]
        for key in ("padding_side", "truncation_side")
        if source_config.get(key) in ("left", "right")
    }
    config |= {role: text for role in OTHER_ROLES if (text := token_text(source_config.get(role))) in vocabulary}
    for key in MORE_TOKENS:
        more = source_config.get(key)
        texts = [token_text(one) for one in more] if isinstance(more, list) else []
        if known := [text for text in texts if text in vocabulary]:
            config[key] = known
            break
    config |= {"tokenizer_class": CLASS, "bos_token": bos, "eos_token": eos}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _is_chat_template(value: object) -> bool:
    """Whether it is a text, or a list of texts with names."""
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    )


def _byte_level(ranks: Mapping[bytes, int], specials: tuple[str, ...], split: str | None) -> tokenizers.Tokenizer:
    """A tokenizer that merges bytes by rank, puts BOS (the first of `specials`) before a text, and can decode.

    `split`: the regular expression that splits a text before merging; None: no split.
    """
    names = _characters()

    def named(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    vocabulary = {named(token): rank for token, rank in ranks.items()}
    merges = [(named(first), named(second)) for first, second in _merges(ranks)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        tokenizer.pre_tokenizer = bytes_alone
    else:
        first = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    bos = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that merge into each token, by rank: the result of the merges of lower rank on its bytes.

    A token that these merges do not reduce to two parts has no merge: it is used only for a whole piece of text, as in
    tiktoken.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(parts[at] + parts[at + 1], rank), at) for at in range(len(parts) - 1)]
            lowest, at = min(pairs)
            if lowest >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary: the byte itself if it is printable (GPT-2)."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
