"""What comes from Hugging Face: tokenizers, configurations, indexes and headers of weights, and the Hub's listings."""

from __future__ import annotations

import base64
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from fuzzing import Reader
from hf_models import SPEC, random_model, write_hf
from hub_server import git_sha1
from tokenizer_folders import TOKENIZER

from quadriga.checkpoint.hf import refuse_other_names
from quadriga.checkpoint.hf_folder import HfFolder
from quadriga.config.assets import tokenizer_facts
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.tokenizer_export import transformers_files
from quadriga.models.registry import positions_from_hf, spec_from_hf, tensor_names

CHARSMAP = (2048).to_bytes(4, "little") + bytes(2048) + b"a"  # a table that maps nothing
UNIGRAM = {
    **TOKENIZER,
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -3.0], ["\u2581", -4.0]],
        "byte_fallback": False,
    },
}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{{ messages }}",
    "model_max_length": 100,
    "additional_special_tokens": ["<s>"],
    "added_tokens_decoder": {
        "5": {"content": "<s>", "special": True},
        "7": {"content": "<more>", "lstrip": False, "normalized": False, "special": True},
        "8": {"content": "ba", "special": False, "single_word": True},
    },
}


def write_json(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def build_bpe(folder: Path) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": {"content": "<unk>"}}
    write_json(folder, tokenizer=TOKENIZER, tokenizer_config=TOKENIZER_CONFIG, special_tokens_map=named)


def build_unigram(folder: Path) -> None:
    write_json(folder, tokenizer=UNIGRAM, tokenizer_config=TOKENIZER_CONFIG)


def build_vocabulary(folder: Path) -> None:
    write_json(folder, vocab={"a": 0, "b": 1, "ab": 2, "\u0120": 3}, tokenizer_config=TOKENIZER_CONFIG)
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def build_ranks(folder: Path) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_text("".join(lines))


def read_tokenizer(folder: Path) -> None:
    tokenizer_facts(str(folder))
    build_tokenizer(str(folder)).encode_batch(["ab 12", "\u00e9"])
    transformers_files(str(folder))


def build_weights(folder: Path) -> None:
    write_hf(random_model(SPEC), folder / "hf")


def build_indexed(folder: Path) -> None:
    write_hf(random_model(SPEC), folder / "hf")
    file = "model-00001-of-00001.safetensors"
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / file)
    names = tensor_names(SPEC)
    listed = {"metadata": {"total_size": 1}, "weight_map": {names.hf_name(name): file for name in names.shapes}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(listed))


def read_weights(folder: Path) -> None:
    source = HfFolder(folder / "hf")
    config = source.config()
    spec = spec_from_hf(config, source.config_file)
    positions_from_hf(config)
    names = tensor_names(spec)
    names.config_differences(config, source.config_file)
    refuse_other_names(source, names, names.shapes)
    for name, shape in names.shapes.items():
        source.fill(names.hf_name(name), torch.empty(shape), (0,) * len(shape))


@cache
def script() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "scripts" / "download_hf_assets.py"
    spec = importlib.util.spec_from_file_location("download_hf_assets", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_listing(folder: Path) -> None:
    lfs = {"sha256": "0" * 64, "size": 5, "pointerSize": 128}
    names = ("config.json", "tokenizer.json", "original/tokenizer.model")
    files = [{"rfilename": name, "size": 3, "blobId": git_sha1(b"abc")} for name in names]
    weights = {"rfilename": "model.safetensors", "size": 5, "blobId": git_sha1(b"x"), "lfs": lfs}
    write_json(folder, listing={"sha": "0" * 40, "siblings": [*files, weights], "tags": ["a"], "gated": False})


def read_listing(folder: Path) -> None:
    module = script()
    content = (folder / "listing.json").read_bytes()
    _, files = module.read_listing(content, "http://127.0.0.1/api/models/org/name", "org/name")
    module.files_of(("tokenizer", "config", "safetensors"), files, "org/name")


READERS = [
    Reader(
        "tokenizer bpe",
        build_bpe,
        read_tokenizer,
        [b"\\p{L}+", b"(a+)+$", b"(?:a{1000}){1000}", b'"Regex"', b'"1999999":'],
    ),
    Reader("tokenizer vocabulary", build_vocabulary, read_tokenizer, [b"# #", b"a b c", b'"9":', b'"content"']),
    Reader("tokenizer unigram", build_unigram, read_tokenizer),
    Reader("tokenizer ranks", build_ranks, read_tokenizer, [b" ", b"YQ==", b"9" * 4000, b"=" * 100]),
    Reader("hf config", build_weights, read_weights, [b"llama", b"1e300"], damages=("**/config.json",)),
    Reader("hf header", build_weights, read_weights, [b'"data_offsets"', b"F32"], damages=("**/*.safetensors",)),
    Reader("hf index", build_indexed, read_weights, [b"../model.safetensors"], damages=("**/*.index.json",)),
    Reader("hub listing", build_listing, read_listing, [b"../", b".safetensors"]),
]
