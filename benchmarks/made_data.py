"""A small tokenizer and documents for `fidelity.py`, in the paths of torchtitan's defaults.

The tokenizer has BOS and EOS only in `added_tokens_decoder` of tokenizer_config.json, as some published ones do.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path

import common  # noqa: F401 (finds the package)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quadriga.data.builtin import BuiltinSource

TOKENIZER = Path("tests", "assets", "tokenizer")  # `model.hf_assets_path` by default
DOCUMENTS = Path("tests", "assets", "c4_test")  # what `c4_test` reads
VOCABULARY = 2000  # without BOS and EOS; the debug model has 2,048 entries
CHARACTERS = 2000  # maximum of one document


def standard_library(characters: int) -> str:
    """The first `characters` characters of text of the Python standard library. Raises SystemExit if there are
    fewer."""
    source, text = BuiltinSource(held_out=False), ""
    for shard in range(source.shards):
        for record in source.read(shard):
            text += source.parse(record).text
        if len(text) >= characters:
            return text[:characters]
    raise SystemExit(f"the standard library has {len(text):,} characters of text; {characters:,} are needed")


def write_tokenizer(folder: Path, text: str) -> Callable[[str], int]:
    """Train a byte-level BPE on `text`. Returns a function that counts tokens of a document, with BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    size = tokenizer.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = ("<|begin|>", "<|end|>")
    config = {
        "added_tokens_decoder": {str(size + at): {"content": token, **flags} for at, token in enumerate(special)},
        "bos_token": special[0],
        "eos_token": special[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return lambda document: len(tokenizer.encode(document).ids) + len(special)


def split_documents(text: str) -> list[str]:
    return [text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)]


def write_documents(folder: Path, documents: list[str]) -> None:
    """One file of JSON lines with the fields of C4."""
    folder.mkdir(parents=True)
    lines = (json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in documents)
    (folder / "data.json").write_text("".join(lines), encoding="utf-8")


def documents_with_tokens(tokens: int, text: str, count: Callable[[str], int], documents: int = 4) -> list[str]:
    """Documents from `text` that together have exactly `tokens` tokens.

    Raises SystemExit if `text` does not have them.
    """
    found: list[str] = []
    for document in split_documents(text):
        wanted = tokens // (documents - len(found))
        beginning = next((part for part in _prefixes(document, wanted, count) if count(part) == wanted), None)
        if beginning is not None:
            found.append(beginning)
            tokens -= wanted
        if len(found) == documents:
            return found
    raise SystemExit(f"the text does not have {documents} documents of {tokens} tokens together")


def _prefixes(document: str, tokens: int, count: Callable[[str], int]) -> Iterator[str]:
    """Prefixes with about `tokens` tokens. The search assumes that longer prefixes have more tokens."""
    near = bisect_left(range(len(document)), tokens, key=lambda end: count(document[:end]))
    return (document[:end] for end in range(max(near - 20, 1), near + 20))
