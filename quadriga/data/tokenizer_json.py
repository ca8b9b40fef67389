"""Opens a `tokenizer.json` with the library `tokenizers`, and checks it first.

The library is written in Rust. A defect in the file causes an exception, a panic (which is not an `Exception`), or the
end of the process. To prevent the last, some values are checked here before the library reads them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from quadriga import limits
from quadriga.config.tokenizer_files import NOT_HUGGING_FACE, VOCABULARIES, TokenizerFiles, parts, read_tokenizer_files
from quadriga.errors import Problem, UserError, shortened

PROBE = "Hello world 12 \u00e9\u6f22\n"  # a file that fails on every text is rejected before training
ERROR_SHOWN = 300  # characters of the library's message


def open_tokenizer(path: Path, fix: str) -> tuple[tokenizers.Tokenizer, TokenizerFiles]:
    """The tokenizer, which does not truncate, pad or parse special tokens in a text; and the content of its files.

    Raises:
        UserError: the file is not a tokenizer, or cannot be used; `fix` is the remedy in the message.
    """
    # `tokenizers` would start one thread per core in every rank; `num_workers` sets the number of threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        files = read_tokenizer_files(path)
    except UserError as error:
        if any(problem.where != str(path) for problem in error.problems) or path.name in VOCABULARIES:
            raise
        what = f"{NOT_HUGGING_FACE}: {error.problems[0].what}"
        raise UserError(Problem(str(path), what, fix=fix)) from error
    document = files.extended.document
    if wrong := next(_fatal_defects(document), None):
        raise UserError(Problem(str(path), f"{NOT_HUGGING_FACE}: {wrong}", fix=fix))
    if document["model"].get("dropout"):
        what = "drops merges at random (model.dropout), so the ids of a text would vary"
        raise UserError(Problem(str(path), what, fix="set it to null"))
    try:
        with _panic_output_suppressed():
            # From the parsed document: if the file has a key twice, the value that was checked must be the one used.
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
            tokenizer.encode_special_tokens = True  # the spelling of a special token in a text is ordinary text
            tokenizer.no_truncation()
            tokenizer.no_padding()
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is not an Exception; others are raised again
        raise unusable(error, path, NOT_HUGGING_FACE, fix) from None
    with _panic_output_suppressed():
        encode(tokenizer, [PROBE], path)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < limits.VOCABULARY:
        what = f"its largest id is {largest}" if largest >= 0 else "its vocabulary is empty"
        raise UserError(Problem(str(path), what, allowed=f"ids below {limits.VOCABULARY:,}", fix=fix))
    for text, number in files.extended.added.items():
        if (given := tokenizer.token_to_id(text)) != number:
            what = f"{shortened(text)} is added with the id {number}, but the library gives it {given}"
            raise UserError(Problem(str(path), what, fix="write the token into tokenizer.json"))
    return tokenizer, files


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], path: Path) -> list[list[int]]:
    """The ids of each text, without BOS and EOS. Raises UserError if the library cannot encode a text."""
    try:
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is not an Exception; others are raised again
        fix = "use a tokenizer that can encode every text (with an unknown token, or byte fallback)"
        raise unusable(error, path, "cannot encode a text", fix) from None
    return [encoding.ids for encoding in encoded]


def begins_with(tokenizer: tokenizers.Tokenizer, token: int | None, path: Path) -> bool:
    """Whether the file's post-processor puts this token before a text. Raises UserError if it fails."""
    try:
        return token is not None and tokenizer.encode("").ids[:1] == [token]
    except BaseException as error:  # noqa: BLE001 - as above
        raise unusable(error, path, "its post-processor cannot be used", "set post_processor to null") from None


def unusable(error: BaseException, path: Path, what: str, fix: str) -> UserError:
    """Converts an error of the library to a UserError. Raises any other error unchanged."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    return UserError(Problem(str(path), f"{what}: {shortened(error, ERROR_SHOWN)}", fix=fix))


@contextmanager
def _panic_output_suppressed() -> Iterator[None]:
    """If the body raises, drops what it wrote to standard error, because Rust prints its panics there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            raise
        else:
            os.dup2(kept, 2)
            captured.seek(0)
            with open(kept, "wb", closefd=False) as stderr:
                stderr.write(captured.read())
        finally:
            os.close(kept)


def _fatal_defects(document: Any) -> Iterator[str]:
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        yield 'it has no object "model"'
        return
    model = document["model"]
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if prefix and isinstance(merges, list):
        if not isinstance(prefix, str):
            yield "model.continuing_subword_prefix is not a string"
            return
        seconds = (_second(merge) for merge in merges)
        wrong = next((second for second in seconds if not second.startswith(prefix)), None)
        if wrong is not None:
            yield f"a merge's second part, {shortened(wrong)}, lacks the prefix {shortened(prefix)}"
    for part in parts(document.get("normalizer"), "normalizers"):
        if part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
            yield "a precompiled_charsmap is damaged"


def _second(merge: object) -> str:
    """The second part of a merge, which is "a b" or ["a", "b"]; "" if it is neither."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return parts[1] if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], str) else ""


def _is_charsmap(value: object) -> bool:
    """Whether the length in the first 4 bytes fits the bytes that follow: the library allocates that much memory."""
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        return False
    size = int.from_bytes(raw[:4], "little")
    return len(raw) > 4 and size % 4 == 0 and 0 < size <= len(raw) - 4
