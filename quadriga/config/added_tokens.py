"""Adds the tokens that `tokenizer.json` lacks but the files next to it name, as torchtitan v0.2.2 does.

They are added in this order, each with the next free id. A token that exists keeps its id, also if
`added_tokens_decoder` has another one:

1. bos_token, eos_token, pad_token, unk_token, sep_token, cls_token, mask_token
2. `added_tokens_decoder` of `tokenizer_config.json`, in the order of the file
3. `extra_special_tokens`, else `additional_special_tokens` (only in transformers)

transformers starts with the second group, ordered by id. A notice is printed if that gives other ids, or if a file
names other ids than both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga import limits
from quadriga.config.special_tokens import CONFIG, MAP, MAX_TOKEN_CHARS, SpecialTokens, token_text, type_problem
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import format_some

OTHER_ROLES = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TRANSFORMERS_ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # the order of transformers
MORE_TOKENS = ("extra_special_tokens", "additional_special_tokens")
DECODER = "added_tokens_decoder"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
SPECIAL = {**FLAGS, "normalized": False, "special": True}
MAX_LISTED = 4  # tokens that one notice names


@dataclass(frozen=True)
class NamedToken:
    """A token that a file names. `id`: its id in that file, or None; `flags`: how it is matched in a text."""

    text: str
    id: int | None
    flags: Mapping[str, bool]


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with the added tokens.

    - `document`: the `tokenizer.json` with the added tokens.
    - `vocabulary`: ids by token.
    - `added`: the tokens that it lacked, with their ids.
    - `changed`: tokens that are searched for in texts in another way than by the `tokenizer.json` alone, so ids differ.
    - `notices`: messages for the user.
    """

    document: dict[str, Any]
    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    changed: tuple[str, ...]
    notices: tuple[str, ...]


def vocabulary_of(document: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token of a `tokenizer.json`. Parts that do not have its format are ignored."""
    vocabulary: dict[str, int] = {}
    model, added = document.get("model"), document.get("added_tokens")
    entries = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(entries, list):
        entries = {
            item[0]: at
            for at, item in enumerate(entries)
            if isinstance(item, list) and item and isinstance(item[0], str)
        }
    if isinstance(entries, dict):
        vocabulary = {token: number for token, number in entries.items() if type(number) is int}
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int:
            vocabulary[entry["content"]] = entry["id"]
    return vocabulary


def extend_tokenizer(folder: Path, document: Mapping[str, Any], tokens: SpecialTokens) -> ExtendedTokenizer:
    """A `tokenizer.json` with the tokens that the files next to it name.

    Raises:
        UserError: an entry of `added_tokens_decoder` has a wrong format, or the next id of a token is taken.
    """
    before = vocabulary_of(document)
    roles, decoder, more = list(_roles(tokens)), list(_decoder(folder, tokens)), list(_more(tokens))
    added = _ids(folder, document, before, [*roles, *decoder, *more])
    vocabulary = {**before, **added}
    flags = {one.text: one.flags for one in (*more, *roles, *decoder)}  # the decoder's flags are the most exact
    raw = {one.text: one.flags for one in decoder}
    old = document.get("added_tokens")
    entries = {entry["content"]: entry for entry in old if _is_entry(entry)} if isinstance(old, list) else {}
    for text in filter(
        None, (tokens.bos, tokens.eos)
    ):  # always special: a text cannot contain the limits of a document
        raw[text] = flags[text] = {**flags[text], "special": True}
    changed = tuple(sorted(text for text in raw if _matches(raw[text]) != _matches(entries.get(text))))
    for text in flags:
        if text in added or text in changed:
            entries[text] = {"id": vocabulary[text], "content": text, **flags[text]}
    whole = dict(document)
    if added or changed:
        whole["added_tokens"] = sorted(entries.values(), key=lambda entry: entry["id"])
    by_id = sorted(decoder, key=lambda one: one.id or 0)
    transformers_ids = _ids(folder, document, before, [*by_id, *_roles(tokens, TRANSFORMERS_ROLES), *more])
    notices = tuple(_notices(folder, vocabulary, decoder, added, transformers_ids))
    return ExtendedTokenizer(whole, vocabulary, added, changed, notices)


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int


def _matches(flags: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """How a text is searched for the token. None if it is not searched: special tokens, and tokens of the model."""
    if flags is None or flags.get("special", True):
        return None
    return {name: bool(flags.get(name, name == "normalized")) for name in (*FLAGS, "normalized")}


def _roles(tokens: SpecialTokens, others: Iterable[str] = OTHER_ROLES) -> Iterator[NamedToken]:
    config, named = tokens.raw.get(CONFIG, {}), tokens.raw.get(MAP, {})
    for text in (tokens.bos, tokens.eos):
        if text is not None:
            yield NamedToken(text, None, SPECIAL)
    for role in others:
        text = token_text(named[role] if role in named else config.get(role))
        if text and len(text) <= MAX_TOKEN_CHARS:
            yield NamedToken(text, None, SPECIAL)


def _decoder(folder: Path, tokens: SpecialTokens) -> Iterator[NamedToken]:
    raw = tokens.raw.get(CONFIG, {}).get(DECODER)
    if raw is None:
        return
    if not isinstance(raw, dict):
        raise UserError(type_problem(folder / CONFIG, DECODER, raw, "an object: a token by its id"))
    for key, entry in raw.items():
        text = token_text(entry) if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) < 20) or not text or len(text) > MAX_TOKEN_CHARS:
            allowed = 'an id, and an object with "content", such as "128000": {"content": "<|begin_of_text|>"}'
            what = f"the entry of {shortened(key)} is not a token"
            raise UserError(Problem(f"{folder / CONFIG}, {DECODER}", what, shortened(entry), allowed=allowed))
        flags = {name: entry.get(name, default) is True for name, default in FLAGS.items()}
        special = entry.get("special", True) is not False
        yield NamedToken(
            text, int(key), {**flags, "normalized": entry.get("normalized", not special) is True, "special": special}
        )


def _more(tokens: SpecialTokens) -> Iterator[NamedToken]:
    raw = {**tokens.raw.get(CONFIG, {}), **tokens.raw.get(MAP, {})}
    lists = (raw[key] for key in MORE_TOKENS if isinstance(raw.get(key), list))
    for text in map(token_text, next(lists, [])):
        if text and len(text) <= MAX_TOKEN_CHARS:
            yield NamedToken(text, None, SPECIAL)


def _ids(
    folder: Path, document: Mapping[str, Any], vocabulary: Mapping[str, int], tokens: Iterable[NamedToken]
) -> dict[str, int]:
    """The ids of the tokens that the vocabulary lacks, as the library `tokenizers` assigns them: above all ids added so
    far, and not below the number of the model's own tokens."""
    model, added = document.get("model"), document.get("added_tokens")
    own = model.get("vocab") if isinstance(model, dict) else None
    size = len(own) if isinstance(own, dict | list) else 0
    taken = {number: text for text, number in vocabulary.items()}
    largest = max((entry["id"] for entry in added if _is_entry(entry)), default=-1) if isinstance(added, list) else -1
    found: dict[str, int] = {}
    for one in tokens:
        if one.text in vocabulary or one.text in found:
            continue
        number = max(largest + 1, size)
        if number in taken:
            what = (
                f"{shortened(one.text)} would be added with the next id, {number}, which {shortened(taken[number])} has"
            )
            fix = "write the token into tokenizer.json: load the folder with AutoTokenizer and save it"
            raise UserError(Problem(str(folder / CONFIG), what, fix=fix))
        if number >= limits.VOCABULARY:
            raise UserError(Problem(str(folder / CONFIG), f"adds tokens above the id {limits.VOCABULARY:,}"))
        found[one.text] = largest = number
    return found


def _notices(
    folder: Path,
    vocabulary: Mapping[str, int],
    decoder: Iterable[NamedToken],
    added: Mapping[str, int],
    transformers_ids: Mapping[str, int],
) -> Iterator[str]:
    config = folder / CONFIG
    if wrong := [one for one in decoder if one.id != vocabulary[one.text]]:
        named = _format_list(f"{shortened(one.text)} {vocabulary[one.text]} (not {one.id})" for one in wrong)
        other = [text for text in added if added[text] != transformers_ids[text]]
        same = (
            f"transformers: {_format_list(f'{shortened(t)} {transformers_ids[t]}' for t in other)}"
            if other
            else "as in transformers"
        )
        yield (
            f"{config}: added tokens have the ids of torchtitan (the next free ones), not those of {DECODER}: {named}; "
            f"{same}. To choose ids, write the tokens into tokenizer.json"
        )
    elif other := [text for text in added if added[text] != transformers_ids[text]]:
        named = _format_list(f"{shortened(text)} {added[text]} ({transformers_ids[text]})" for text in other)
        yield f"{config}: added tokens have the ids of torchtitan (in parentheses those of transformers): {named}"


def _format_list(texts: Iterable[str]) -> str:
    return format_some(list(texts), MAX_LISTED)
