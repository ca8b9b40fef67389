"""A faster library that encodes as `tokenizers` does, and the check that its ids are equal. Only `quadriga tokenize`
uses it, on request.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import numpy as np

from quadriga.config.assets import TOKENIZER_LIBRARIES
from quadriga.data.sources import BadRecord, Source
from quadriga.data.tokenizer import Ids, JsonTokenizer, Tokenizer
from quadriga.data.tokenizer_json import unusable
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import grouped

TOKENIZERS, FASTOKENS = TOKENIZER_LIBRARIES
WHERE, LEAVE_OUT = "--library", f"leave out --library, or set it to {TOKENIZERS}"
SAMPLED_SHARDS = 64
SAMPLED_CHARACTERS = 1 << 14  # of each of them
GROUP_CHARACTERS = 1 << 18
CODE_POINTS_IN_A_TEXT = 64
RANDOM_TEXTS = 2000
SHOWN_IDS = 8
# What the regular expressions of tokenizers treat differently. Random texts are made of these.
PARTS = (
    *("a", "Z", "the", "INTO", "\u00e9", "\u00df", "\u0130", "e\u0301", "\u01c5", "\u0416", "\u05d0", "\u0627\u064b"),
    *("\u0915\u094d\u0937", "\u0e01\u0e33", "\u4e2d\u6587", "\u3042\u30fc", "\ud55c", "\u1112\u1161\u11ab"),
    *("0", "7", "123", "2048", "\u00b2", "\u00bd", "\u0663", "\u2167", "\u4e09", "\U0001d7d8"),
    *("'s", "'S", "'ll", "'RE", "'\u017f", "\u2019s", "'", '"', ".", ",", "...", "!?", "_", "-", "--", "/", "\\", "@#"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u2003", "\u2028", "\u3000", "\x85", "\x0b"),
    *("\x1c", "\x00", "\x1b", "\x7f", "\u200b", "\u200d", "\u00ad", "\ufeff", "\ufffd", "\ufffe", "\ufe0f"),
    *("\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001fae8", "\U0001f1e9\U0001f1ea", "\U000e0041", "\U0010ffff"),
)


def require_known_library(name: str) -> None:
    """Raises UserError: the library is not installed."""
    if name != TOKENIZERS and find_spec(name) is None:
        raise UserError(Problem(WHERE, f"{name} is not installed", fix=f"pip install {name}"))


def library_version(name: str) -> str:
    """The name, and the version of a library that is not the default: another version may give other ids."""
    return name if name == TOKENIZERS else f"{name} {metadata.version(name)}"


class FastTokenizer:
    """The library `fastokens` with the vocabulary, special ids and fingerprint of a `tokenizer.json`.

    `slow` is the same tokenizer of the library `tokenizers`. `require_equal` compares them.
    """

    earlier = None

    def __init__(self, slow: Tokenizer, path: str) -> None:
        """`path`: of the tokenizer, for messages. Raises UserError: it is no `tokenizer.json` that the library can
        read."""
        if not isinstance(slow, JsonTokenizer):
            what = f"{FASTOKENS} reads only a tokenizer.json"
            raise UserError(Problem(WHERE, what, path, fix=LEAVE_OUT))
        import fastokens

        self.slow, self._path = slow, Path(path)
        self.vocab_size, self.fingerprint = slow.vocab_size, slow.fingerprint
        self.bos_id, self.eos_id, self.special_ids = slow.bos_id, slow.eos_id, slow.special_ids
        try:
            self._fast = fastokens.Tokenizer.from_json_str(slow.as_json())
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is not an Exception; others are raised again
            raise unusable(error, self._path, f"{FASTOKENS} cannot read it", LEAVE_OUT) from None

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        try:
            # The spelling of a special token in a text is ordinary text.
            encoded, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except BaseException as error:  # noqa: BLE001 - as above
            raise unusable(error, self._path, f"{FASTOKENS} cannot encode a text", LEAVE_OUT) from None
        ids = np.frombuffer(encoded, "<u4").astype(np.int32)
        return np.split(ids, np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64)) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.slow.decode(ids)

    def require_equal(self, source: Source) -> None:
        """Compares the ids of `hard_texts` and of samples of the data. Raises UserError with the first difference."""
        texts = chain(hard_texts(self.slow.added_tokens), _sampled(source))
        for group in grouped(texts, len, GROUP_CHARACTERS):
            for text, fast, slow in zip(group, self.encode_batch(group), self.slow.encode_batch(group), strict=True):
                if not np.array_equal(fast, slow):
                    raise UserError(self._difference(text))

    def _differs(self, text: str) -> bool:
        return not np.array_equal(self.encode_batch([text])[0], self.slow.encode_batch([text])[0])

    def _difference(self, text: str) -> Problem:
        """The problem, shown with a short part of the text that differs too."""
        size = len(text) // 2
        while size:
            cuts = (text[:start] + text[start + size :] for start in range(0, len(text), size))
            shorter = next((cut for cut in cuts if self._differs(cut)), None)
            text, size = (text, size // 2) if shorter is None else (shorter, min(size, len(shorter) // 2))
        fast, slow = (each.encode_batch([text])[0].tolist()[:SHOWN_IDS] for each in (self, self.slow))
        what = f"{FASTOKENS} gives other ids than {TOKENIZERS}: {fast}, not {slow}, for the text"
        return Problem(WHERE, what, shortened(ascii(text), 200), fix=LEAVE_OUT)


def hard_texts(added_tokens: Sequence[str] = ()) -> Iterator[str]:
    """Texts in which libraries differ most likely: each code point between letters, digits and spaces, long runs, the
    spelling of added tokens, and random sequences. The same in each call; another Python can know more characters."""
    yield from ("", " ", "\n", "a" * 5000, " " * 5000, "\n" * 500, "1" * 500, "=" * 5000, "\u4e2d" * 2000, "ab " * 3000)
    for token in added_tokens[:1000]:
        yield from (token, f"a{token}b", f" {token} {token}\n", token[:-1], token.upper())
    points = filter(_is_tested, range(0x110000))
    while several := list(islice(points, CODE_POINTS_IN_A_TEXT)):
        yield "".join(f"a{chr(point)}1 {chr(point)}b" for point in several)
    rng = random.Random(0)
    for length in range(RANDOM_TEXTS):
        yield "".join(rng.choices(PARTS, k=1 + length % 40))


def _is_tested(point: int) -> bool:
    """All code points that are assigned, except that of the large ranges (ideographs, syllables, private use) and of
    the unassigned ones every 16th is enough; no surrogate."""
    category = unicodedata.category(chr(point))
    large = category in ("Co", "Cn") and point >= 0x20000
    return category != "Cs" and (point % 16 == 0 or not (large or (category == "Lo" and point >= 0x3400)))


def _sampled(source: Source) -> Iterator[str]:
    """The beginnings of some shards."""
    for shard in range(0, source.shards, -(-source.shards // SAMPLED_SHARDS)):
        left = SAMPLED_CHARACTERS
        for record in source.read(shard):
            try:
                text = source.parse(record).text[:left]
            except BadRecord:
                continue  # reported when the shard is tokenized
            yield text
            left -= len(text) + 1
            if left <= 0:
                break
