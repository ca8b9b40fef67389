"""Keys of token files: what belongs together, what validation inherits, and what a run without a tokenizer prints."""

from __future__ import annotations

from typing import get_args

import pytest
from tokenizer_folders import byte_level, write_folder

from quadriga.config.schema import TokenKeys, Training, Validation
from quadriga.config.schema.training import TokenFormat, TokenType
from quadriga.data.token_files import TOKEN_FORMATS
from quadriga.data.token_formats import TOKEN_DTYPES

TOKENS = ("--training.dataset=tokens",)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "ids.bin").write_bytes(bytes(4096))
    return f"--training.dataset_path={tmp_path}/ids.bin"


def test_the_formats_and_types_are_those_of_the_readers():
    assert set(get_args(TokenFormat)) == set(TOKEN_FORMATS)
    assert set(get_args(TokenType)) == set(TOKEN_DTYPES)


def test_a_path_is_needed(refusal):
    (problem,) = refusal(*TOKENS)
    assert problem.where == "training.dataset, training.dataset_path"


def test_a_misspelt_format_is_named(refusal, path):
    (problem,) = refusal(*TOKENS, path, "--training.token_format=megatrn")
    assert problem.where == "training.token_format"
    assert problem.nearest == "megatron"


REFUSED = [
    (("--training.token_format=raw",), "training.token_format", "uint16"),
    (("--training.token_eos_id=2048",), "training.token_eos_id", "the id that ends a document"),
    (("--training.dataloader.on_bad_record=skip",), "training.dataloader.on_bad_record", '"stop"'),
    (("--validation.enable", "--validation.dataset=builtin_validation"), "model.hf_assets_path", "tokenizer"),
    (
        ("--validation.enable", "--validation.dataset=tokens", "--validation.token_format=raw", "VALID"),
        "validation.token_format",
        "validation.token_dtype",
    ),
    (
        (*("--validation.enable", "--validation.dataset=tokens", "VALID"), "--validation.token_eos_id=5000"),
        "validation.token_eos_id",
        "the id",
    ),
]


@pytest.mark.parametrize(("arguments", "where", "fix"), REFUSED)
def test_contradictions_are_refused(refusal, path, arguments, where, fix):
    given = [path.replace("training", "validation") if each == "VALID" else each for each in arguments]
    (problem,) = refusal(*TOKENS, path, *given)
    assert problem.where.startswith(f"{where} = ")
    assert fix in problem.fix


@pytest.mark.parametrize("name", ["token_format=raw", "token_dtype=uint16", "token_eos_id=0"])
@pytest.mark.parametrize("table", ["training", "validation"])
def test_the_keys_belong_to_token_files(refusal, read_config, name, table):
    enabled = ("--validation.enable", "--validation.dataset=builtin_validation")
    found = refusal(f"--{table}.{name}", *enabled)
    assert any(f'{table}.dataset = "builtin' in problem.where for problem in found)
    if table == "validation":
        read_config(f"--{table}.{name}")  # no validation reads it


def test_no_notice_is_about_the_built_in_tokenizer(read_config, path):
    run = read_config(*TOKENS, path)
    assert run.spec.tokenizer.kind == "none"
    assert not [notice for notice in run.spec.notices if "tokenizer" in notice]


def test_a_configured_tokenizer_is_compared_with_the_model(refusal, read_config, path, tmp_path):
    folder = f"--model.hf_assets_path={write_folder(tmp_path / 'tokenizer', byte_level())}"
    run = read_config(*TOKENS, path, folder)
    assert run.spec.tokenizer.vocab_size == 260
    assert any(notice.startswith("the tokenizer has 260 ids") for notice in run.spec.notices)
    (problem,) = refusal(*TOKENS, path, folder, "--model.vocab_size=200")
    assert "only 200 rows" in problem.what


def test_a_pair_of_megatron_is_named_by_its_prefix(read_config, refusal, tmp_path):
    prefix = f"--training.dataset_path={tmp_path}/pile_text_document"
    (problem,) = refusal(*TOKENS, prefix)
    assert problem.what == "nothing is there"
    (tmp_path / "pile_text_document.bin").write_bytes(b"12")
    read_config(*TOKENS, prefix)


def test_validation_inherits_what_it_does_not_set():
    training = Training(dataset="tokens", token_format="raw", token_dtype="uint32", token_eos_id=2)
    assert Validation(dataset="tokens", dataset_path="v").token_keys(training) == TokenKeys(
        "validation", "v", "raw", "uint32", 2, None
    )
    other = Validation(dataset="tokens", token_format="megatron", token_eos_id=3).token_keys(training)
    assert (other.format, other.dtype, other.eos_id) == ("megatron", None, 3)


def test_a_column_of_texts_is_not_one_of_ids():
    assert Training(dataset="tokens").token_keys.field is None
    assert Training(dataset="tokens", dataset_text_field="ids").token_keys.field == "ids"
    texts = Training(dataset="jsonl", dataset_text_field="content")
    assert Validation(dataset="tokens").token_keys(texts).field is None
