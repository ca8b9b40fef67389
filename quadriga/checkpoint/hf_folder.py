"""Reads a folder of Hugging Face weights: only safetensors, in one file, or in several files with an index.

A file is opened for one tensor at a time and memory-mapped, so only the copied part is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quadriga.checkpoint.files import Location, is_url, local
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger
from quadriga.reading import read_json, read_json_object
from quadriga.units import format_some

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_BYTES = 1 << 26  # bytes per matrix that are compared at a time
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOAD_AGAIN = "download the folder again: python scripts/download_hf_assets.py --assets all"
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # names in a file


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from the header of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfFolder:
    """A folder of weights. Its names are read on construction, its tensors on request."""

    def __init__(self, location: Location) -> None:
        """Raises UserError if it is not a folder of safetensors, or if its index lists missing files."""
        self.path = local(location)
        if is_url(location) and not str(location).startswith("file://"):
            fix = "copy the folder to a disk of this machine first"
            raise UserError(Problem(str(location), "Hugging Face weights are read from files, not from a URL", fix=fix))
        if not os.path.isdir(self.path):
            raise UserError(_no_folder(self.path))
        if os.path.isfile(self.path / SINGLE):
            self._files = dict.fromkeys(_names_in(self.path / SINGLE), self.path / SINGLE)
        elif os.path.isfile(self.path / INDEX):
            self._files = _read_index(self.path / INDEX)
        else:
            raise UserError(_no_weights(self.path))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    @property
    def config_file(self) -> str:
        return str(self.path / CONFIG)

    def config(self) -> dict[str, Any]:
        """The content of `config.json`. Raises UserError if it is missing or is not a JSON object.

        As in transformers, `tie_word_embeddings` is ignored if the output layer differs from the embedding.
        """
        if not os.path.lexists(self.config_file):
            what = "missing: only this file has the number of heads and the rotary frequencies of the model"
            raise UserError(Problem(self.config_file, what, fix=DOWNLOAD_AGAIN))
        try:
            config = read_json(self.config_file, what="model's configuration")
        except UserError as error:
            what = f"cannot be read: {error.problems[0].what}"
            raise UserError(Problem(self.config_file, what, fix=DOWNLOAD_AGAIN)) from error
        if not isinstance(config, dict):
            raise UserError(Problem(self.config_file, "is not a JSON object", fix=DOWNLOAD_AGAIN))
        if config.get("tie_word_embeddings") is True and {HEAD, EMBEDDING} <= self._files.keys():
            if self._are_equal(HEAD, EMBEDDING):
                del self._files[HEAD]
            else:
                config["tie_word_embeddings"] = False
                logger.warning(
                    f"{self.config_file} has tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: loaded as untied"
                )
        return config

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices are equal. Only some rows of each are in memory at a time."""
        entries = self.entries((one, other))
        shape = entries[one].shape
        if entries[one] != entries[other] or len(shape) != 2:
            return False
        rows = max(1, COMPARED_BYTES // max(1, shape[1] * entries[one].dtype.itemsize))
        with _opened(self._files[one]) as first, _opened(self._files[other]) as second:
            a, b = first.get_slice(one), second.get_slice(other)
            return all(torch.equal(a[at : at + rows], b[at : at + rows]) for at in range(0, shape[0], rows))

    def entries(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Shapes and dtypes by name; each file is opened once. Raises UserError for damaged files and other dtypes."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._files[name], []).append(name)
        found = {}
        for path, inside in wanted.items():
            with _opened(path) as file:
                for name in inside:
                    part = file.get_slice(name)
                    if (form := part.get_dtype()) not in FORMATS:
                        what, allowed = f"{name} has dtype {form}, which is not supported", ", ".join(FORMATS)
                        raise UserError(Problem(str(path), what, allowed=allowed))
                    found[name] = TensorInfo(tuple(part.get_shape()), FORMATS[form])
        return found

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """The names sorted by file, so that each file is read in one pass."""
        return sorted(names, key=lambda name: (str(self._files[name]), name))

    def fill(self, name: str, into: torch.Tensor, offset: Sequence[int]) -> None:
        """Copies the slice of a tensor at `offset` with the shape of `into` to `into`, and converts the dtype."""
        box = tuple(slice(start, start + size) for start, size in zip(offset, into.shape, strict=True))
        with _opened(self._files[name]) as file, torch.no_grad():
            into.copy_(file.get_slice(name)[box])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Converts errors of the library, and those of opening, to a UserError: a damaged file."""
    is_open = False
    try:
        with safe_open(str(path), framework="pt") as file:
            is_open = True
            yield file
    except (SafetensorError, OSError) as error:
        if is_open and isinstance(error, OSError):  # the disk's, of the caller's work
            raise
        what = f"damaged or incomplete: {shortened(error, 300)}"
        raise UserError(Problem(str(path), what, fix=DOWNLOAD_AGAIN)) from error


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor, from the index. Raises UserError if a file is missing or in another folder."""
    try:
        listed = read_json_object(index, what="index").get("weight_map")
    except UserError as error:
        raise UserError(_no_index(index, error.problems[0].what)) from error
    if not isinstance(listed, dict):
        raise UserError(_no_index(index, 'it has no object "weight_map"'))
    files = {name: file if isinstance(file, str) else shortened(file) for name, file in listed.items()}
    elsewhere = sorted(
        {file for file in files.values() if Path(file).name != file or not file.endswith(".safetensors")}
    )
    if elsewhere:
        what = f"has entries other than safetensors next to it: {format_some([shortened(file) for file in elsewhere])}"
        raise UserError(Problem(str(index), what))
    absent = sorted({file for file in files.values() if not os.path.isfile(index.parent / file)})
    if absent:
        what = f"lists files that are missing: {format_some([shortened(file) for file in absent])}"
        raise UserError(Problem(str(index), what, fix=DOWNLOAD_AGAIN))
    return {name: index.parent / file for name, file in files.items()}


def _no_index(index: Path, reason: str) -> Problem:
    return Problem(str(index), f"not an index of safetensors: {reason}", fix=DOWNLOAD_AGAIN)


def _no_folder(path: Path) -> Problem:
    fix = "use the folder that has config.json and the safetensors"
    if len(path.parts) == 2 and not path.is_absolute():  # like the name of a repository of the Hub
        fix = f"python scripts/download_hf_assets.py --repo_id {path} --assets all; then use the folder that it prints"
    what = "there is no such folder" if not path.exists() else "a file; its folder is expected"
    return Problem(str(path), what, fix=fix)


def _no_weights(path: Path) -> Problem:
    there = sorted(entry.name for entry in path.iterdir())
    if (path / ".metadata").exists() or any(name.startswith("step-") for name in there):
        what = "a checkpoint of torch.distributed.checkpoint, not Hugging Face weights"
        return Problem(str(path), what, fix="leave checkpoint.initial_load_in_hf at false")
    if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
        what = (
            f"weights as a pickle ({format_some(pickles)}): reading one can run any code, so only safetensors are read"
        )
        fix = "use a revision with safetensors, or, if you trust it, convert it with transformers: save_pretrained"
        return Problem(str(path), what, fix=fix)
    what = f"has neither {SINGLE} nor {INDEX}; it contains {format_some(there) or 'nothing'}"
    return Problem(str(path), what, fix=DOWNLOAD_AGAIN)
