"""The files of a tokenizer: which ones a path means, and their contents, without the library `tokenizers`.

tokenizer.json                        of the library `tokenizers`
tokenizer.model                       of Llama 3: base64 tokens and their ranks; also in original/
vocab.json or vocab.txt, merges.txt   of GPT-2, read like torchtitan v0.2.2: without the merges that begin with #
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga import limits
from quadriga.config.added_tokens import ExtendedTokenizer, extend_tokenizer, vocabulary_of
from quadriga.config.special_tokens import CONFIG, SpecialTokens, read_special_tokens
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import decode, parse_json, read_bytes

VOCABULARIES = ("vocab.json", "vocab.txt")
MERGES = "merges.txt"
CANDIDATES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model", *VOCABULARIES)
NOT_HUGGING_FACE = "not a tokenizer of Hugging Face"


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer. `content`: the bytes that identify it; `extended`: with the tokens that other files
    add."""

    file: Path
    content: bytes
    extended: ExtendedTokenizer
    tokens: SpecialTokens
    notices: tuple[str, ...]


def find_tokenizer(path: str) -> Path | None:
    """The file of the tokenizer at `path`, which is a folder or the file itself; None if there is none."""
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):
        return place
    files = (place / name for name in CANDIDATES)
    return next((file for file in files if os.path.isfile(file) or _leads_nowhere(file)), None)


def _leads_nowhere(file: Path) -> bool:
    """Whether it is a link without a target. Such a file counts, so that the error of reading it names it."""
    return os.path.islink(file) and not os.path.exists(file)


def is_json(file: Path) -> bool:
    """Whether the library `tokenizers` reads the file. Otherwise it has tiktoken's ranks."""
    return file.suffix == ".json" or file.name in VOCABULARIES


def read_tokenizer_files(file: Path) -> TokenizerFiles:
    """The tokenizer of a file and of those next to it. Raises UserError if one cannot be read, or they conflict."""
    document, content, notices = _vocabulary(file) if file.name in VOCABULARIES else _tokenizer_json(file)
    vocabulary = vocabulary_of(document)
    if (largest := max(vocabulary.values(), default=0)) >= limits.VOCABULARY:
        raise UserError(Problem(str(file), f"its largest id is {largest}", allowed=f"ids below {limits.VOCABULARY:,}"))
    tokens = read_special_tokens(file.parent, vocabulary, is_byte_level(document))
    extended = extend_tokenizer(file.parent, document, tokens)
    return TokenizerFiles(
        file, content, extended, tokens, (*notices, *extended.notices, *_special_token_notices(file, tokens))
    )


def _special_token_notices(file: Path, tokens: SpecialTokens) -> Iterator[str]:
    if tokens.guessed and (tokens.bos or tokens.eos):
        names = f"BOS {tokens.bos}, EOS {tokens.eos}"
        yield f"{file}: no file next to it names special tokens; the usual names give {names} (torchtitan: none)"
    elif not tokens.guessed and tokens.bos is None and tokens.eos is None:
        yield f"{file.parent / CONFIG} names neither BOS nor EOS: documents are not separated"


def is_byte_level(document: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer of the file maps bytes to characters, as GPT-2 and Llama 3 do."""
    return any(part.get("type") == "ByteLevel" for part in parts(document.get("pre_tokenizer"), "pretokenizers"))


def parts(part: Any, inside: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, and all that it contains."""
    found: list[Mapping[str, Any]] = []
    stack = [part]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            found.append(one)
            stack += one[inside] if isinstance(one.get(inside), list) else []
    return found


def _tokenizer_json(file: Path) -> tuple[dict[str, Any], bytes, tuple[str, ...]]:
    content = read_bytes(file, limits.TOKENIZER_BYTES, what="tokenizer")
    document = parse_json(content, str(file))
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise UserError(Problem(str(file), 'has no object "model"'))
    return document, content, ()


def _vocabulary(file: Path) -> tuple[dict[str, Any], bytes, tuple[str, ...]]:
    """A `tokenizer.json` made from a vocabulary and merges."""
    merges = file.parent / MERGES
    if not os.path.lexists(merges):
        what = f"a vocabulary without {MERGES}: each document would be one unknown token"
        fix = (
            f"add {MERGES} to the folder, or the tokenizer.json of the model (AutoTokenizer.save_pretrained writes it)"
        )
        raise UserError(Problem(str(file), what, fix=fix))
    text = _text(file)
    lines = (line.strip() for line in _lines(text))
    ids = {token: at for at, token in enumerate(lines) if token} if file.suffix == ".txt" else _ids(file, text)
    pairs, left_out = [], 0
    for line in _lines(_text(merges)):
        both = line.split()
        if line.strip().startswith("#"):
            left_out += len(both) == 2 and not line.startswith("#version")
        elif len(both) >= 2:
            pairs.append(both[:2])
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": bytes_alone,
        "decoder": {**bytes_alone, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": ids, "merges": pairs},
    }
    notice = f"{merges}: {left_out:,} merges that begin with # are ignored, as in torchtitan; a tokenizer.json has them"
    return document, json.dumps(document).encode(), (notice,) if left_out else ()


def _text(file: Path) -> str:
    return decode(read_bytes(file, limits.TOKENIZER_BYTES, what="file of a tokenizer"), str(file))


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _ids(file: Path, text: str) -> dict[str, int]:
    raw = parse_json(text.encode(), str(file))
    if isinstance(raw, dict) and all(type(number) is int and number >= 0 for number in raw.values()):
        return raw
    what = f"not a vocabulary: {shortened(raw)}"
    raise UserError(Problem(str(file), what, allowed='an object of ids by token: {"a": 0, "b": 1}'))
