"""A folder of Hugging Face weights, as it is read: safetensors alone, in one file or in several with an index.

A file is opened for one tensor at a time and mapped into memory, so that no more of it is held than what is copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
COMPARED_BYTES = 1 << 26  # bytes of each of two matrices that are compared at a time
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOAD_AGAIN = "download the folder again: python scripts/download_hf_assets.py --assets all"
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as files say it


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor before its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfFolder:
    """The names are read at once, the tensors when they are asked for."""

    def __init__(self, location: Location) -> None:
        """Raises UserError where there is no folder of safetensors, or where its index names what is not there."""
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
        """What `config.json` says. Raises UserError where it is missing or is no table.

        As in transformers, `tie_word_embeddings` does not hold where the file has an output layer of other numbers.
        """
        if not os.path.lexists(self.config_file):
            what = "missing: it says how many heads the model has and how it turns positions, which no tensor tells"
            raise UserError(Problem(self.config_file, what, fix=DOWNLOAD_AGAIN))
        try:
            config = read_json(self.config_file, what="model's configuration")
        except UserError as error:
            what = f"cannot be read: {error.problems[0].what}"
            raise UserError(Problem(self.config_file, what, fix=DOWNLOAD_AGAIN)) from error
        if not isinstance(config, dict):
            raise UserError(Problem(self.config_file, "holds no table of JSON", fix=DOWNLOAD_AGAIN))
        if config.get("tie_word_embeddings") is True and {HEAD, EMBEDDING} <= self._files.keys():
            if self._are_equal(HEAD, EMBEDDING):
                del self._files[HEAD]
            else:
                config["tie_word_embeddings"] = False
                logger.warning(
                    f"{self.config_file} says tie_word_embeddings, but {HEAD} is not {EMBEDDING}: read as not tied"
                )
        return config

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices are the same numbers; some rows of each are in memory at a time."""
        entries = self.entries((one, other))
        shape = entries[one].shape
        if entries[one] != entries[other] or len(shape) != 2:
            return False
        rows = max(1, COMPARED_BYTES // max(1, shape[1] * entries[one].dtype.itemsize))
        with _SafetensorsFile(self._files[one]) as first, _SafetensorsFile(self._files[other]) as second:
            a, b = first.get_slice(one), second.get_slice(other)
            return all(torch.equal(a[at : at + rows], b[at : at + rows]) for at in range(0, shape[0], rows))

    def entries(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Shapes and formats; each file is opened once. Raises UserError for damaged files and unknown formats."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._files[name], []).append(name)
        found = {}
        for path, inside in wanted.items():
            with _SafetensorsFile(path) as file:
                for name in inside:
                    part = file.get_slice(name)
                    if (form := part.get_dtype()) not in FORMATS:
                        what, allowed = f"{name} is in the format {form}, which is not read here", ", ".join(FORMATS)
                        raise UserError(Problem(str(path), what, allowed=allowed))
                    found[name] = TensorInfo(tuple(part.get_shape()), FORMATS[form])
        return found

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """The names sorted by file, so that each file is read in one go."""
        return sorted(names, key=lambda name: (str(self._files[name]), name))

    def fill(self, name: str, into: torch.Tensor, offset: Sequence[int]) -> None:
        """Copy the box of a tensor that begins at `offset` and has the shape of `into`; dtypes may differ."""
        box = tuple(slice(start, start + size) for start, size in zip(offset, into.shape, strict=True))
        with _SafetensorsFile(self._files[name]) as file, torch.no_grad():
            into.copy_(file.get_slice(name)[box])


class _SafetensorsFile:
    """A safetensors file for a `with` block; what the library finds wrong with it is told as a damaged file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(str(self._path), framework="pt")
            return self._file.__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(self._damaged(error)) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise UserError(self._damaged(error)) from error

    def _damaged(self, error: Exception) -> Problem:
        return Problem(str(self._path), f"damaged or incomplete: {shortened(error, 300)}", fix=DOWNLOAD_AGAIN)


def _names_in(path: Path) -> list[str]:
    with _SafetensorsFile(path) as file:
        return list(file.keys())


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor, as the index says; only files beside it count, and all must be there."""
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
        what = f"names files that are no safetensors beside it: {format_some([shortened(file) for file in elsewhere])}"
        raise UserError(Problem(str(index), what))
    absent = sorted({file for file in files.values() if not os.path.isfile(index.parent / file)})
    if absent:
        what = f"names files that are not there: {format_some([shortened(file) for file in absent])}"
        raise UserError(Problem(str(index), what, fix=DOWNLOAD_AGAIN))
    return {name: index.parent / file for name, file in files.items()}


def _no_index(index: Path, reason: str) -> Problem:
    return Problem(str(index), f"no index of safetensors: {reason}", fix=DOWNLOAD_AGAIN)


def _no_folder(path: Path) -> Problem:
    fix = "name the folder that holds config.json and the safetensors"
    if len(path.parts) == 2 and not path.is_absolute():  # as a repository of the Hub is called
        fix = f"python scripts/download_hf_assets.py --repo_id {path} --assets all; then name the folder that it prints"
    what = "there is no such folder" if not path.exists() else "a file, where the folder around it is wanted"
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
        fix = "take a revision with safetensors, or save it anew with transformers where you trust it: save_pretrained"
        return Problem(str(path), what, fix=fix)
    what = f"holds neither {SINGLE} nor {INDEX}; there is {format_some(there) or 'nothing'}"
    return Problem(str(path), what, fix=DOWNLOAD_AGAIN)
