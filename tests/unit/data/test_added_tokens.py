"""Tokens that stand in tokenizer_config.json alone: their ids, side by side with transformers and with what torchtitan
v0.2.2 was seen to give; exports; vocabularies with merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizer_folders import byte_level, write_folder

from quadriga.config.assets import tokenizer_facts
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.tokenizer_export import transformers_files
from quadriga.errors import UserError


def token(text: str, **changed: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **flags, **changed}


def decoder(**texts: str) -> dict[str, Any]:
    return {number.removeprefix("n"): token(text) for number, text in texts.items()}


BOTH = {"bos_token": "<b>", "eos_token": "<e>"}
# (special tokens of tokenizer.json, tokenizer_config.json, ids that torchtitan 0.2.2 gave, those of transformers)
FOLDERS: dict[str, tuple[list[str], dict[str, Any], dict[str, int], dict[str, int] | None]] = {
    "as published": (
        [],
        {"added_tokens_decoder": decoder(n256="<b>", n257="<e>"), **BOTH},
        {"<b>": 256, "<e>": 257},
        None,
    ),
    "torchtitan's own test tokenizer": (
        [],
        {"added_tokens_decoder": decoder(n128000="<b>", n128001="<e>"), **BOTH, "pad_token": "<|pad|>"},
        {"<b>": 256, "<e>": 257, "<|pad|>": 258},
        None,
    ),
    "ids that the order contradicts": (
        [],
        {"added_tokens_decoder": decoder(n256="<e>", n257="<b>"), **BOTH},
        {"<b>": 256, "<e>": 257},
        {"<e>": 256, "<b>": 257},
    ),
    "another token first": (
        [],
        {"added_tokens_decoder": decoder(n256="<p>", n257="<b>", n258="<e>", n259="<x>"), **BOTH, "pad_token": "<p>"},
        {"<b>": 256, "<e>": 257, "<p>": 258, "<x>": 259},
        {"<p>": 256, "<b>": 257, "<e>": 258, "<x>": 259},
    ),
    "an id that is taken": (
        ["<s>", "</s>"],
        {"added_tokens_decoder": decoder(n257="<b>", n256="</s>", n3="<x>"), "bos_token": "<b>", "eos_token": "</s>"},
        {"<s>": 256, "</s>": 257, "<b>": 258, "<x>": 259},
        {"<s>": 256, "</s>": 257, "<x>": 258, "<b>": 259},
    ),
    "named at the top alone": (
        [],
        {"bos_token": "<b>", "eos_token": {"content": "<e>", "__type": "AddedToken"}, "pad_token": "<p>"},
        {"<b>": 256, "<e>": 257, "<p>": 258},
        None,
    ),
    "tokens of the model": ([], {"added_tokens_decoder": {}, "bos_token": "a", "eos_token": "b"}, {}, None),
    "null": (
        [],
        {"added_tokens_decoder": decoder(n256="<e>"), "bos_token": None, "eos_token": "<e>"},
        {"<e>": 256},
        None,
    ),
    "found in a text": (
        [],
        {
            "added_tokens_decoder": {
                **decoder(n256="<b>", n257="<e>"),
                "258": token("foo", special=False, normalized=True),
            },
            **BOTH,
        },
        {"<b>": 256, "<e>": 257, "foo": 258},
        None,
    ),
}  # fmt: skip


def folder_of(place: Path, name: str) -> Path:
    specials, config, _, _ = FOLDERS[name]
    return write_folder(
        place, byte_level(specials), tokenizer_config={**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    )


def added(vocabulary: dict[str, int]) -> dict[str, int]:
    return {text: number for text, number in vocabulary.items() if number >= 256}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_beside_torchtitan_and_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    _, config, there, other = FOLDERS[name]
    folder = folder_of(tmp_path / "in", name)
    ours = build_tokenizer(str(folder))
    names = [one.get("content") if isinstance(one, dict) else one for one in (config["bos_token"], config["eos_token"])]
    plain = {chr(byte): i for i, byte in enumerate(range(ord("!"), ord("~") + 1))}
    assert list(ours.special_ids) == [None if one is None else there.get(one, plain.get(one)) for one in names]
    assert added(AutoTokenizer.from_pretrained(folder).get_vocab()) == (other or there)
    for file, content in transformers_files(str(folder)).items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / file).write_bytes(content)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert added(exported.get_vocab()) == there
    assert (exported.bos_token_id, exported.eos_token_id) == ours.special_ids
    again = build_tokenizer(str(tmp_path / "out"))
    for text in ("a foo b<b>", "foofoo"):
        ids = ours.encode_batch([text])[0].tolist()
        assert ids == again.encode_batch([text])[0].tolist()
        if "<" not in text:  # a text that spells a special token is a text here
            assert exported(text, add_special_tokens=False).input_ids == ids
    facts = tokenizer_facts(str(folder))
    assert facts.vocab_size == ours.vocab_size == max([255, *there.values()]) + 1
    contradicted = any(
        there.get(one["content"]) != int(number) for number, one in config.get("added_tokens_decoder", {}).items()
    )
    assert len(facts.notices) == contradicted


def test_the_library_gives_the_same_ids(tmp_path):
    """An independent way to torchtitan's ids: its list of tokens, in its order, given to the library at once."""
    for number, (name, (_, config, there, _)) in enumerate(FOLDERS.items()):
        folder = folder_of(tmp_path / str(number), name)
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tops = (config.get(role) for role in ("bos_token", "eos_token", "pad_token"))
        texts = [one["content"] if isinstance(one, dict) else one for one in tops if one is not None]
        library.add_special_tokens(
            [*texts, *(one["content"] for one in config.get("added_tokens_decoder", {}).values())]
        )
        assert added(library.get_vocab()) == there, name


def test_one_notice_states_what_the_ids_are(tmp_path):
    own = tokenizer_facts(str(folder_of(tmp_path / "a", "torchtitan's own test tokenizer")))
    (notice,) = own.notices
    assert "<b> 256 (not 128000), <e> 257 (not 128001); as in transformers" in notice
    swapped = tokenizer_facts(str(folder_of(tmp_path / "b", "ids that the order contradicts")))
    (notice,) = swapped.notices
    assert "<e> 257 (not 256), <b> 256 (not 257); transformers: <b> 257, <e> 256" in notice


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        ({"x": token("<b>")}, "added_tokens_decoder", "the entry of x is not a token"),
        ({"-1": token("<b>")}, "added_tokens_decoder", "the entry of -1 is not a token"),
        ({"256": "<b>"}, "added_tokens_decoder", "the entry of 256 is not a token"),
        ({"256": {"content": 3}}, "added_tokens_decoder", "the entry of 256 is not a token"),
        ({"9" * 30: token("<b>")}, "added_tokens_decoder", "is not a token"),
        (["<b>"], "added_tokens_decoder", "JSON array"),
    ],
)
def test_what_is_no_list_of_tokens_is_named_before_the_launch(tmp_path, value, where, what):
    folder = write_folder(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": value, "eos_token": "</s>"})
    for read in (tokenizer_facts, build_tokenizer):
        with pytest.raises(UserError) as refused:
            read(str(folder))
        (problem,) = refused.value.problems
        assert problem.where.endswith(where)
        assert what in problem.what


def test_an_id_that_would_be_given_twice_is_refused(tmp_path):
    """The library counts the tokens of a model; where their ids have holes, the next one may be another's."""
    document = byte_level([])
    vocabulary = document["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 256
    folder = write_folder(tmp_path, document, tokenizer_config={"bos_token": "<b>", "eos_token": "<e>"})
    for read in (tokenizer_facts, build_tokenizer):
        with pytest.raises(UserError, match=f"next id, 256, which {last} has"):
            read(str(folder))


def test_a_checkpoint_from_before_tokens_were_found_in_a_text_is_recognized(tmp_path):
    plain = folder_of(tmp_path / "a", "as published")
    searched = folder_of(tmp_path / "b", "found in a text")
    ours, other = build_tokenizer(str(plain)), build_tokenizer(str(searched))
    assert ours.fingerprint.split("+")[0] == ours.fingerprint != other.fingerprint
    assert other.fingerprint.split("+")[0] == ":".join(ours.fingerprint.split(":")[:2])


def test_special_tokens_that_no_document_gets_need_no_row(tmp_path):
    """A padding token on top of a vocabulary that fills the model is common; it is never met in training."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    folder = write_folder(tmp_path / "tok", byte_level(["<s>", "</s>"]), tokenizer_config=config)
    facts = tokenizer_facts(str(folder))
    assert (facts.vocab_size, facts.used_vocab_size) == (259, 258)


GPT2 = {"a": 0, "b": 1, "ab": 2, "#": 3, "##": 4, "\u0120": 5, "\u0120a": 6, "c": 7}
MERGES = "#version: 0.2\na b\n# #\n\u0120 a\n"


def vocabulary_folder(place: Path, *, name: str = "vocab.json", merges: str | None = MERGES) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{text}\n" for text in GPT2)
    (place / name).write_text(json.dumps(GPT2) if name.endswith("json") else lines, encoding="utf-8")
    if merges is not None:
        (place / "merges.txt").write_text(merges, encoding="utf-8")
    (place / "tokenizer_config.json").write_text(json.dumps(BOTH))
    return place


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt"])
def test_a_vocabulary_with_merges(tmp_path, name):
    """As torchtitan reads it: bytes, and no merge that begins with #, of which a notice tells."""
    from transformers import AutoTokenizer

    folder = vocabulary_folder(tmp_path / "in", name=name)
    ours = build_tokenizer(str(folder))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (8, 9, 10)
    assert ours.encode_batch(["ab a##c"])[0].tolist() == [2, 6, 3, 3, 7]
    facts = tokenizer_facts(str(folder))
    assert (facts.kind, facts.vocab_size) == ("huggingface", 10)
    assert "1 merges that begin with # are ignored" in " ".join(facts.notices)
    for file, content in transformers_files(str(folder)).items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / file).write_bytes(content)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("ab a##c", add_special_tokens=False).input_ids == [2, 6, 3, 3, 7]
    assert (exported.bos_token_id, exported.eos_token_id) == (8, 9)
    assert np.array_equal(build_tokenizer(str(folder / name)).encode_batch(["ab"])[0], [2])


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt"])
def test_a_vocabulary_without_merges_is_refused_before_the_launch(tmp_path, name):
    folder = vocabulary_folder(tmp_path, name=name, merges=None)
    for read in (tokenizer_facts, build_tokenizer):
        with pytest.raises(UserError, match=r"without merges.txt: each document would be one unknown token"):
            read(str(folder))


@pytest.mark.parametrize("content", ["[1]", '{"a": "b"}', '{"a": -1}', "{", ""])
def test_a_vocabulary_that_is_none(tmp_path, content):
    folder = vocabulary_folder(tmp_path)
    (folder / "vocab.json").write_text(content)
    for read in (tokenizer_facts, build_tokenizer):
        with pytest.raises(UserError):
            read(str(folder))


def test_bos_in_a_text_is_text_also_if_a_file_calls_it_not_special(tmp_path):
    plain = byte_level()
    plain["added_tokens"] = [one | {"special": False} for one in plain["added_tokens"]]
    folder = write_folder(tmp_path, plain, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = build_tokenizer(str(folder))
    (ids,) = tokenizer.encode_batch(["a<s>b</s>"])
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_a_file_whose_target_is_gone_is_named(tmp_path, name):
    folder = write_folder(tmp_path, byte_level())
    (folder / "vocab.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name}(?s:.*)leads nowhere"):
        build_tokenizer(str(folder))


def test_an_id_beyond_the_limit_is_that_of_its_file(tmp_path):
    huge = byte_level()
    huge["added_tokens"][0]["id"] = 2**31
    folder = write_folder(tmp_path, huge, tokenizer_config={"bos_token": "<new>", "eos_token": "</s>"})
    with pytest.raises(UserError, match=r"tokenizer\.json(?s:.*)its largest id is 2147483648"):
        build_tokenizer(str(folder))
