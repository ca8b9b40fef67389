"""Checks of tokenizers and data sets without their libraries: whether they exist, and the size of the vocabulary.

`training.dataset` names the kind of data, `training.dataset_path` the place. Relative paths are relative to the
directory that the run is started from.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga import limits
from quadriga.config import tokenizer_files
from quadriga.config.run_spec import TokenizerFacts
from quadriga.config.schema import TOKENS
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.file_search import files_below, files_matching
from quadriga.reading import file_kind, read_bytes

BUILTIN_TOKENIZER = "builtin:bytes"
TOKENIZER_LIBRARIES = ("tokenizers", "fastokens")  # what can encode with a tokenizer.json; the first is the default
TEST_SET = "c4_test"  # of torchtitan; it is read as another data set (`titan_datasets`)
BYTES_VOCAB = 258  # 256 bytes, and the tokens for the begin and the end of a document
TIKTOKEN_SPECIALS = 256  # special tokens of Llama 3, in addition to the ranks of its tokenizer.model


@dataclass(frozen=True)
class DatasetKind:
    """One kind of data set. `suffixes`: of the files that are read from a folder; `path`: none, optional or needed.
    For the Hub it is that of a repository. `keys`: those of `OPTIONAL_KEYS` that it has."""

    suffixes: tuple[str, ...]
    path: str
    keys: tuple[str, ...] = ()


HUB = "hub"  # any data set of the Hugging Face Hub
PACKED = (".gz", ".zst")  # of texts and JSON lines that are compressed
REMOTE = ("text", "jsonl", "parquet")  # can be at URLs
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}  # of fsspec
DRIVERS |= {"http": "aiohttp requests", "https": "aiohttp requests"}
TOKEN_KEYS = ("token_format", "token_dtype", "token_eos_id")
TEMPLATE = ("dataset_template", "dataset_prompt")
OPTIONAL_KEYS = (*TEMPLATE, "dataset_config", "dataset_split", "dataset_streaming", *TOKEN_KEYS)


def _plain_or_packed(*suffixes: str) -> tuple[str, ...]:
    return (*suffixes, *(suffix + packed for suffix in suffixes for packed in PACKED))


DATASETS: Mapping[str, DatasetKind] = {
    "builtin": DatasetKind((), "none"),
    "builtin_validation": DatasetKind((), "none"),
    "c4": DatasetKind((".json.gz", ".json.zst"), "optional", TEMPLATE),
    "c4_validation": DatasetKind((".json.gz", ".json.zst"), "optional", TEMPLATE),
    "text": DatasetKind(_plain_or_packed(".txt", ".text", ".md", ".rst"), "needed"),
    "jsonl": DatasetKind(_plain_or_packed(".jsonl", ".json", ".ndjson"), "needed", TEMPLATE),
    "parquet": DatasetKind((".parquet",), "needed", TEMPLATE),
    "arrow": DatasetKind((".arrow",), "needed", (*TEMPLATE, "dataset_split")),
    HUB: DatasetKind((), "repository", (*TEMPLATE, "dataset_config", "dataset_split", "dataset_streaming")),
    TOKENS: DatasetKind((".bin", ".npy", ".parquet", ".arrow"), "needed", TOKEN_KEYS),
}


def tokenizer_facts(path: str) -> TokenizerFacts:
    """Kind and vocabulary size of the tokenizer at `path`: a folder (`tokenizer_files`), a file, or `builtin:bytes`.

    If nothing exists there, the kind is `missing` and the size None.

    Raises:
        UserError: the file is not a tokenizer, or the files next to it cannot be used with it.
    """
    if path == BUILTIN_TOKENIZER:
        return TokenizerFacts("bytes", path, BYTES_VOCAB)
    file = tokenizer_files.find_tokenizer(path)
    if file is None:
        return TokenizerFacts("missing", path, None)
    try:
        if tokenizer_files.is_json(file):
            return _json_facts(file)
        size = _rank_count(read_bytes(file, limits.RANKS_BYTES, what="tokenizer")) + TIKTOKEN_SPECIALS
        return TokenizerFacts("tiktoken", str(file), _bounded(size))
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError) and any(
            problem.where != str(file) or problem.fix for problem in error.problems
        ):
            raise
        reason = error.problems[0].what if isinstance(error, UserError) else shortened(error)
        what = f"the file is not a tokenizer that Quadriga can read: {reason}"
        fix = "download it again (python scripts/download_hf_assets.py), or name another folder"
        forms = "tokenizer.json of the `tokenizers` library, or Llama 3's tokenizer.model"
        raise UserError(Problem(str(file), what, allowed=forms, fix=fix)) from error


def _json_facts(file: Path) -> TokenizerFacts:
    files = tokenizer_files.read_tokenizer_files(file)
    extended, tokens = files.extended, files.tokens
    size = _bounded(_json_vocab(extended.document))
    never = set(extended.added) - {tokens.bos, tokens.eos, *extended.changed}
    used_vocab_size = max(number for text, number in extended.vocabulary.items() if text not in never) + 1
    return TokenizerFacts("huggingface", str(file), size, min(used_vocab_size, size), files.notices)


def _bounded(size: int) -> int:
    if size > limits.VOCABULARY:
        raise ValueError(f"its largest id is {size - 1}; only ids below {limits.VOCABULARY:,} are supported")
    return size


def _json_vocab(content: Any) -> int:
    """One more than the largest id of a `tokenizer.json`."""
    vocab = content["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [token["id"] for token in content.get("added_tokens") or ()]
    if not ids:
        raise ValueError("its vocabulary is empty")
    if wrong := next((one for one in ids if type(one) is not int or one < 0), None):
        raise ValueError(f"its vocabulary has the id {shortened(wrong)}")
    return max(ids) + 1


def _rank_count(content: bytes) -> int:
    """The number of lines of a `tokenizer.model` in tiktoken's format: a token in base64 and its rank."""
    lines = content.splitlines()
    token, _, rank = lines[0].partition(b" ") if lines else (b"", b"", b"")
    try:
        base64.b64decode(token, validate=True)
        int(rank)
    except (binascii.Error, ValueError) as error:
        raise ValueError("it has no lines of token and rank (a SentencePiece model, perhaps)") from error
    return len(lines)


def is_remote(path: str) -> bool:
    """Whether a path is that of another machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """The path of a `file://` URL, or the path itself."""
    return path.removeprefix("file://")


def data_files(dataset: str, path: str) -> list[Path]:
    """The files of `path`, sorted: the file itself, those of a folder and its sub-folders, or those of a glob. The
    name of a Megatron data set without suffix stands for its two files."""
    folder = Path(local_path(path)).expanduser()
    if os.path.isdir(folder):  # like `isfile`, False for a name that is too long or below a folder without access
        found = [folder / name for name in files_below(folder).files]
        found = [file for file in found if file.name.lower().endswith(DATASETS[dataset].suffixes)]
    elif os.path.isfile(folder):
        found = [folder]
    else:
        found = [Path(name) for name in files_matching(str(folder))]
    if dataset == TOKENS and not found:
        found = [Path(f"{folder}{suffix}") for suffix in (".bin", ".idx")]
    return sorted(file for file in found if os.path.isfile(file))


def dataset_problem(key: str, dataset: str, path: str | None, source: str | None) -> Problem | None:
    """Why the data set of `key` (`training.dataset` or `validation.dataset`) is not possible. Files are not checked."""
    if dataset not in DATASETS:
        names = sorted([*DATASETS, TEST_SET])
        guess = nearest(dataset, names)
        return Problem(key, "no data set has this name", dataset, source, ", ".join(names), guess, _by_suffix(path))
    needs = DATASETS[dataset].path
    if needs == "needed" and path is None:
        fix = f"set {key}_path to a file, a folder or a glob"
        return Problem(
            f"{key}, {key}_path", "this data set is read from files, and no path is given", dataset, source, fix=fix
        )
    if path is not None and is_remote(path) and dataset not in REMOTE:
        what = f"{dataset} is not read from a URL"
        advice = f"copy it to this machine first: quadriga data fetch {path} DIR" if needs == "needed" else None
        return Problem(f"{key}, {key}_path", what, f"{dataset}, {path}", source, ", ".join(REMOTE), fix=advice)
    if needs == "repository" and path is None:
        what, fix = "no data set of the Hub is named", f'set {key}_path to its name, as "org/name"'
        return Problem(f"{key}, {key}_path", what, dataset, source, fix=fix)
    if needs == "none" and path is not None:
        fix = f"remove {key}_path, or read the files there with {key} = text, jsonl, parquet, arrow or tokens"
        return Problem(f"{key}, {key}_path", "this data set has no path", f"{dataset}, {path}", source, fix=fix)
    return None


def foreign_key(dataset: str, name: str) -> tuple[str, list[str]] | None:
    """What is wrong with a key of `OPTIONAL_KEYS` for a data set, and the data sets that have it; None if it has it, or
    is not known."""
    if dataset not in DATASETS or name in DATASETS[dataset].keys:
        return None
    fit = [each for each, kind in DATASETS.items() if name in kind.keys]
    who = "token files have" if fit == [TOKENS] else f"{', '.join(fit)} {'have' if len(fit) > 1 else 'has'}"
    return f"only {who} it", fit


def _by_suffix(path: str | None) -> str | None:
    """The name of a data set that reads files such as `path`."""
    local = (name for name, kind in DATASETS.items() if kind.path == "needed" and path)
    fits = next((name for name in local if str(path).lower().endswith(DATASETS[name].suffixes)), None)
    return f"to read {path}, write {fits}" if fits else None


def missing_files(key: str, dataset: str, path: str, source: str | None) -> Problem | None:
    """A problem if there is nothing to read at `path`, else None. What is on other machines is not looked up."""
    if is_remote(path) or DATASETS[dataset].path == "repository" or data_files(dataset, path):
        return None
    place = Path(local_path(path)).expanduser()
    if os.path.isdir(place):
        what, fix = f"the folder holds no file that {dataset} reads", "name another folder or another data set"
        patterns = ", ".join(f"*{suffix}" for suffix in DATASETS[dataset].suffixes)
        return Problem(f"{key}_path", what, path, source, patterns, fix=fix)
    if os.path.lexists(place):
        mode = place.stat().st_mode if os.path.exists(place) else stat.S_IFLNK
        return Problem(f"{key}_path", f"is {file_kind(mode)}, not a file or a folder", path, source)
    parent = place.parent
    folders = (above for above in reversed(place.parents) if os.path.isdir(above))
    if (closed := next((above for above in folders if not os.access(above, os.X_OK)), None)) is not None:
        what = f"there is no access to the folder {shortened(closed, 400)}"
        return Problem(f"{key}_path", what, path, source, fix="give this user access (chmod), or name another path")
    listed = os.listdir(parent) if os.path.isdir(parent) and os.access(parent, os.R_OK) else []
    close = nearest(place.name, listed)
    fix = f"paths are relative to the directory that the run is started from, {Path.cwd()}"
    return Problem(f"{key}_path", "nothing is there", path, source, nearest=close and str(parent / close), fix=fix)
