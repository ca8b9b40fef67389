"""Text to token ids: bytes, files of the library `tokenizers`, or the original `tokenizer.model` of Llama 3.

Only the trainer adds BOS and EOS. If a text contains the spelling of a special token, it is encoded as ordinary text.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from quadriga import limits
from quadriga.config.assets import BUILTIN_TOKENIZER, BYTES_VOCAB, TIKTOKEN_SPECIALS
from quadriga.config.special_tokens import CONFIG, SpecialTokens
from quadriga.config.tokenizer_files import CANDIDATES, find_tokenizer, is_json
from quadriga.data.tokenizer_json import begins_with, encode, open_tokenizer
from quadriga.errors import Problem, UserError
from quadriga.reading import read_bytes

Ids = npt.NDArray[np.int32]

FETCH = "python scripts/download_hf_assets.py downloads the tokenizer of Llama 3.1; builtin:bytes needs no file"

# The regular expression by which Llama 3 splits text before merging (meta-llama/llama-models).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_PIECE = 20_000  # characters; tiktoken's split takes quadratic time, or the whole stack, on longer words


class SpecialIds(NamedTuple):
    bos_id: int | None
    eos_id: int | None


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def bos_id(self) -> int | None:
        """The first id of a document; None: documents have no BOS. If it equals `eos_id`, only one of them separates
        two documents, at the end of the first."""

    @property
    def eos_id(self) -> int | None:
        """The last id of a document; None: documents have no EOS."""

    @property
    def special_ids(self) -> SpecialIds:
        """BOS and EOS of the vocabulary, also if documents do not get them."""

    @property
    def earlier(self) -> Tokenizer | None:
        """The tokenizer of older checkpoints, if the same files gave documents other special tokens; else None."""

    @property
    def fingerprint(self) -> str:
        """One word without `;`, equal for tokenizers that give equal ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text: int32, shape (ids,), without BOS and EOS. Releases the GIL if the library can.

        Raises UserError if a text cannot be encoded."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids below `vocab_size`, with the spelling of special tokens. Bytes that are not UTF-8 become
        U+FFFD."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 is BOS and 257 is EOS."""

    bos_id = 256
    eos_id = 257
    vocab_size = BYTES_VOCAB
    special_ids = SpecialIds(256, 257)
    earlier = None
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        spelled = {self.bos_id: b"<bos>", self.eos_id: b"<eos>"}
        return b"".join(spelled.get(each) or bytes([each]) for each in ids).decode("utf-8", "replace")


class JsonTokenizer:
    """A tokenizer of the library `tokenizers`. The files next to it name BOS and EOS (`config.special_tokens`).

    Documents get the special tokens of torchtitan v0.2.2: BOS before, EOS after. `add_bos_token` and `add_eos_token`
    are ignored, because they apply to prompts. A token that is both is put before a document. Earlier versions omitted
    BOS if `add_bos_token` was false and the file's post-processor does not add it, and put a token that is both at the
    end: this is `earlier`, for runs that started with it.
    """

    earlier: Tokenizer | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer, files = open_tokenizer(path, FETCH)
        tokens, vocabulary = files.tokens, self._tokenizer.get_vocab(with_added_tokens=True)
        bos, eos = (None if name is None else vocabulary[name] for name in (tokens.bos, tokens.eos))
        self.special_ids = SpecialIds(bos, eos)
        if bos is None and eos is None:
            self._check_special_ids(tokens)
        self.vocab_size = max(vocabulary.values()) + 1
        digest = hashlib.blake2b(files.content, digest_size=8).hexdigest()
        extended = files.extended
        if extended.changed:
            searched = repr([(text, extended.vocabulary[text]) for text in extended.changed])
            digest += f"+{hashlib.blake2b(searched.encode(), digest_size=8).hexdigest()}"
        self._set_special_ids(digest, bos, eos if eos != bos else None)
        earlier = bos if tokens.add_bos is not False or begins_with(self._tokenizer, bos, path) else None
        earlier = None if earlier == eos else earlier
        if (earlier, eos) != (self.bos_id, self.eos_id) and (earlier, eos) != (None, None):
            self.earlier = copy.copy(self)
            self.earlier._set_special_ids(digest, earlier, eos)

    def as_json(self) -> str:
        """The content of a `tokenizer.json` of this tokenizer."""
        return str(self._tokenizer.to_str())

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that are found in a text before it is split, and the special ones, which are not."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def _set_special_ids(self, digest: str, bos: int | None, eos: int | None) -> None:
        self.bos_id, self.eos_id = bos, eos
        self.fingerprint = f"json:{digest}:{bos}:{eos}"

    def _check_special_ids(self, tokens: SpecialTokens) -> None:
        """Raises UserError, unless the files state that there is neither."""
        what = "the tokenizer has neither a BOS nor an EOS token, so nothing would separate documents"
        if tokens.guessed:
            begin = "set" if CONFIG in tokens.raw else f"create {CONFIG} and set"
            fix = f"{begin} bos_token and eos_token in {CONFIG}, or set both to null there to train without them"
            raise UserError(Problem(str(self._path), what, fix=fix))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, np.int32) for ids in encode(self._tokenizer, texts, self._path)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class RanksTokenizer:
    """The original `tokenizer.model` of Llama 3: byte-pair ranks in the format of tiktoken, and 256 special tokens."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        content = read_bytes(path, limits.RANKS_BYTES, what="tokenizer")
        ranks = read_ranks(path, content)
        specials = {f"<|special_{index}|>": len(ranks) + index for index in range(TIKTOKEN_SPECIALS)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials
        )
        self.bos_id = len(ranks)  # <|begin_of_text|>
        self.eos_id = len(ranks) + 1  # <|end_of_text|>
        self.special_ids = SpecialIds(self.bos_id, self.eos_id)
        self.earlier = None
        self.vocab_size = len(ranks) + TIKTOKEN_SPECIALS
        self.fingerprint = f"ranks:{hashlib.blake2b(content, digest_size=8).hexdigest()}"

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def _encode(self, text: str) -> Ids:
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _cut_endless(text)]
        return np.concatenate([piece.astype(np.int32) for piece in pieces]) if pieces else np.empty(0, np.int32)


def build_tokenizer(hf_assets_path: str) -> Tokenizer:
    """The tokenizer of `model.hf_assets_path`: `builtin:bytes`, a folder (`config.tokenizer_files`) or a file.

    Raises UserError if it does not exist or cannot be used.
    """
    if hf_assets_path == BUILTIN_TOKENIZER:
        return ByteTokenizer()
    path = tokenizer_file(hf_assets_path)
    return JsonTokenizer(path) if is_json(path) else RanksTokenizer(path)


def tokenizer_file(hf_assets_path: str) -> Path:
    """The file of a tokenizer; the path is the file or its folder. Raises UserError if there is none."""
    if (file := find_tokenizer(hf_assets_path)) is not None:
        return file
    path = Path(os.path.expanduser(hf_assets_path))
    what, allowed = "there is no such file or folder", None
    if os.path.isdir(path):
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        what, allowed = f"the folder has no tokenizer; it contains {there}", ", ".join(CANDIDATES)
    raise UserError(Problem("model.hf_assets_path", what, value=hf_assets_path, allowed=allowed, fix=FETCH))


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Parses lines of `base64 rank`: the rank of each token. Raises UserError if the content is anything else."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            if len(token) > 2 * limits.TOKEN_BYTES:
                raise ValueError
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(_not_ranks(path, content, number)) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        what = f"the ranks of its {len(ranks)} tokens are not 0, 1, 2 ...: the file is incomplete"
        raise UserError(Problem(str(path), what, fix=FETCH))
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        what = f"{len(absent)} of the 256 bytes have no rank, {absent[0]:#04x} first: some texts could not be encoded"
        raise UserError(Problem(str(path), what, fix=FETCH))
    return ranks


def _not_ranks(path: Path, content: bytes, line: int) -> Problem:
    if content[:1] == b"\n":  # the first field of a serialized SentencePiece model
        what = "a SentencePiece model (Llama 2 and before), which cannot be read"
        return Problem(str(path), what, fix="use the tokenizer.json of the same model")
    return Problem(f"{path}, line {line}", "not a line of `base64 rank`, as in Llama 3's tokenizer.model", fix=FETCH)


_ENDLESS = re.compile(rf"\S{{{LONGEST_PIECE}}}|\s{{{LONGEST_PIECE}}}")


def _cut_endless(text: str) -> list[str]:
    """Splits a text within runs of LONGEST_PIECE characters that are all white space or all not white space."""
    cuts = [0, *(match.end() for match in _ENDLESS.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]
