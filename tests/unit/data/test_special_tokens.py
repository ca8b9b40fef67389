"""BOS and EOS as transformers finds them, side by side with its AutoTokenizer, and what documents get of them."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import SPECIALS, byte_level, write_folder

from quadriga.config.special_tokens import CLASS_DEFAULTS
from quadriga.data.sources import Document
from quadriga.data.streams import START, tokenized
from quadriga.data.tokenizer import Tokenizer, build_tokenizer
from quadriga.errors import UserError

BOS, EOS, IM_END, BOTH = range(256, 260)

ABSENT = object()
TYPED = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False}
TOKENS = [ABSENT, None, "", "<s>", "</s>", "<|endoftext|>", "<not there>", TYPED]
IN_MAP = [ABSENT, None, "<s>", "<|im_end|>", {"content": "</s>", "lstrip": False}]
CLASSES = [ABSENT, "LlamaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Unknown"]
DECODER = [ABSENT, {}, {"256": {"content": "<s>", "special": True}}]
ADDS = [ABSENT, True, False]


def without_absent(**keys: Any) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not ABSENT}


def folders() -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """(tokenizer_config.json, special_tokens_map.json) of every kind, in an order that mixes them."""
    configs = [
        without_absent(
            bos_token=bos, eos_token=eos, tokenizer_class=kind, added_tokens_decoder=decoder, add_bos_token=add
        )
        for bos, eos, kind, decoder, add in itertools.product(TOKENS, TOKENS, CLASSES, DECODER, ADDS)
    ]
    maps = [None, *(without_absent(bos_token=bos, eos_token=eos) for bos, eos in itertools.product(IN_MAP, IN_MAP))]
    rng = random.Random(1)
    return [(rng.choice([None, *[config] * 20]), rng.choice(maps)) for config in configs]


def compare(tmp_path: Path, number: int, config: dict[str, Any] | None, named: dict[str, Any] | None) -> None:
    from transformers import AutoTokenizer

    files = {"tokenizer_config": config, "special_tokens_map": named}
    folder = write_folder(tmp_path / str(number), byte_level(), **files)
    theirs = AutoTokenizer.from_pretrained(folder)
    # By name: some classes of transformers leave out the tokens of the file and number them anew.
    names = [theirs.bos_token or None, theirs.eos_token or None]
    about = f"{files}, theirs {names}"
    ours = build_tokenizer(str(folder))
    honoured = [config or {}, {} if "added_tokens_decoder" in (config or {}) else named or {}]
    names_no_tokens = not any(key in file for file in honoured for key in ("bos_token", "eos_token"))
    if names == [None, None] and names_no_tokens:
        assert list(ours.special_ids) == [BOS, EOS], about
    else:  # "<not there>" is added, as transformers does
        numbers = {None: None, "<not there>": 260, **{name: 256 + at for at, name in enumerate(SPECIALS)}}
        assert list(ours.special_ids) == [numbers[name] for name in names], about


@pytest.mark.filterwarnings("ignore")
def test_side_by_side_with_transformers(tmp_path):
    for number, (config, named) in enumerate(folders()[::47]):
        compare(tmp_path, number, config, named)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_side_by_side_with_transformers_in_full(tmp_path):
    for number, (config, named) in enumerate(folders()):
        compare(tmp_path, number, config, named)


def test_defaults_of_classes_are_those_of_transformers():
    import transformers

    for name, defaults in CLASS_DEFAULTS.items():
        parameters = inspect.signature(getattr(transformers, name).__init__).parameters
        theirs = [parameters[role].default if role in parameters else None for role in ("bos_token", "eos_token")]
        assert tuple(None if one is inspect.Parameter.empty else one for one in theirs) == defaults, name


def stream(tokenizer: Tokenizer) -> list[int]:
    """Two documents, "a" and "b", as training reads them: `a` and `b` for theirs, the ids of special tokens."""
    a, b = (ids.tolist() for ids in tokenizer.encode_batch(["a", "b"]))
    documents = [(Document(text), START) for text in ("a", "b")]
    ids = [int(one) for part in tokenized(documents, tokenizer, 4) for one in part.ids]
    return [{a[0]: "a", b[0]: "b"}.get(one, one) for one in ids]


@pytest.mark.parametrize(
    ("specials", "files", "expected"),
    [
        (
            ["<|endoftext|>"],
            {"tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}},
            [256, "a", 256, "b"],
        ),
        (
            ["<s>", "</s>"],
            {"tokenizer_config": {"bos_token": None, "eos_token": "</s>", "add_bos_token": False}},
            ["a", 257, "b", 257],
        ),
        (
            ["[DOC]", "[END]"],
            {
                "tokenizer_config": {"model_max_length": 2048},
                "special_tokens_map": {"bos_token": {"content": "[DOC]"}, "eos_token": "[END]"},
            },
            [256, "a", 257, 256, "b", 257],
        ),
        (
            ["<s>", "</s>", "<|im_end|>"],
            {
                "tokenizer_config": {"model_max_length": 2048},
                "special_tokens_map": {"bos_token": "<s>", "eos_token": "<|im_end|>"},
            },
            [256, "a", 258, 256, "b", 258],
        ),
    ],
    ids=["gpt2", "nullbos", "smap", "smap_conflict"],
)
def test_folders_that_were_once_misread(tmp_path, specials, files, expected):
    assert stream(build_tokenizer(str(write_folder(tmp_path, byte_level(specials), **files)))) == expected


@pytest.mark.parametrize(
    ("config", "begins_with", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, [BOS, "a", EOS, BOS, "b", EOS]),
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>", [BOS, "a", EOS, BOS, "b", EOS]),
        # `add_bos_token: false` is about prompts too: torchtitan asks for BOS at each document.
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, None, [BOS, "a", EOS, BOS, "b", EOS]),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, "<s>", [BOS, "a", EOS, BOS, "b", EOS]),
        # Llama 2 and others say so of prompts; documents end all the same.
        ({"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": False}, None, [BOS, "a", EOS, BOS, "b", EOS]),
        ({"bos_token": "<s>", "eos_token": None}, None, [BOS, "a", BOS, "b"]),
        ({"bos_token": None, "eos_token": "</s>"}, None, ["a", EOS, "b", EOS]),
        ({"bos_token": "", "eos_token": "</s>"}, None, ["a", EOS, "b", EOS]),
        ({"eos_token": "</s>"}, None, ["a", EOS, "b", EOS]),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None, [BOTH, "a", BOTH, "b"]),
        ({"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": False}, None, [EOS, "a", EOS, "b"]),
        ({"tokenizer_class": "GPT2Tokenizer"}, None, [BOTH, "a", BOTH, "b"]),
        ({"bos_token": None, "eos_token": None}, None, ["a", "b"]),
    ],
)
def test_what_documents_get(tmp_path, config, begins_with, expected):
    folder = write_folder(tmp_path, byte_level(begins_with=begins_with), tokenizer_config=config)
    assert stream(build_tokenizer(str(folder))) == expected


def test_a_document_in_segments_gets_its_separator_once(tmp_path):
    config = {"bos_token": "</s>", "eos_token": "</s>"}
    tokenizer = build_tokenizer(str(write_folder(tmp_path, byte_level(), tokenizer_config=config)))
    parts = [Document("a", True, False), Document("a", False, False), Document("a", False, True)]
    ids = [part.ids.tolist() for part in tokenized([(part, START) for part in parts], tokenizer, 4)]
    assert [len(part) for part in ids] == [2, 1, 1]
    assert ids[0][0] == EOS


def test_fingerprints_distinguish_streams(tmp_path):
    """A run that began with two separators, or with BOS, does not go on with another stream in silence."""
    configs = [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        {"bos_token": "</s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": None},
        {"bos_token": None, "eos_token": "</s>"},
    ]
    prints = []
    for number, config in enumerate(configs):
        folder = write_folder(tmp_path / str(number), byte_level(), tokenizer_config=config)
        prints.append(build_tokenizer(str(folder)).fingerprint)
    assert prints[0] == prints[1], "equal ids and equal streams"
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("config", "begins_with", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, None, ["a", EOS, "b", EOS]),
        ({"bos_token": "</s>", "eos_token": "</s>"}, None, ["a", EOS, "b", EOS]),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, "<s>", None),
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, None),
    ],
)
def test_what_documents_got_before_is_known(tmp_path, config, begins_with, expected):
    """Of a run that began with an older version, by the fingerprint that it was saved with then."""
    folder = write_folder(tmp_path, byte_level(begins_with=begins_with), tokenizer_config=config)
    tokenizer = build_tokenizer(str(folder))
    if expected is None:
        assert tokenizer.earlier is None
        return
    assert stream(tokenizer.earlier) == expected != stream(tokenizer)
    digest = tokenizer.fingerprint.split(":")[1]
    assert tokenizer.earlier.fingerprint == f"json:{digest}:None:{EOS}"
    assert tokenizer.earlier.earlier is None


@pytest.mark.parametrize(
    ("files", "where", "says"),
    [
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json, eos_token", "JSON number"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, "tokenizer_config.json, eos_token", "JSON array"),
        ({"tokenizer_config": {"eos_token": {"content": 3}}}, "tokenizer_config.json, eos_token", "JSON object"),
        ({"special_tokens_map": {"bos_token": True}}, "special_tokens_map.json, bos_token", "JSON boolean"),
        ({"tokenizer_config": {"add_bos_token": "no", "eos_token": "</s>"}}, "config.json, add_bos_token", "string"),
        ({"tokenizer_config": ["a"]}, "tokenizer_config.json", "array where a JSON object is expected"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, files, where, says):
    with pytest.raises(UserError) as caught:
        build_tokenizer(str(write_folder(tmp_path, byte_level(), **files)))
    (problem,) = str(caught.value.problems[0]).split("\n\n")
    assert where in problem
    assert says in problem


def test_a_file_that_lies_twice(tmp_path):
    """Of a key that stands twice, the same value is looked at and used."""
    content = json.dumps(byte_level())
    (tmp_path / "tokenizer.json").write_text(content[:-1] + ', "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert build_tokenizer(str(tmp_path)).vocab_size < 256
