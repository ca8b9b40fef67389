"""The headers of Hugging Face weights, read without torch: names, shapes and dtypes, and whether they fit a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from quadriga.checkpoint.files import Location, is_url, local
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.messages import compare_shapes, mismatches
from quadriga.errors import Problem, UserError, nearest, shortened
from quadriga.reading import read_json, read_json_object
from quadriga.units import format_some

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOAD_AGAIN = "download the folder again: python scripts/download_hf_assets.py --assets all"
FORMS = ("F64", "F32", "F16", "BF16")  # the dtypes that are read, by their names in a file
NAME_SHOWN = 200  # characters of a tensor's name, which can have any length in a file
MISSING, SURPLUS = "tensors of the model are missing:", "tensors that the model does not have:"
RESHAPED = "shapes differ:"
Header = tuple[tuple[int, ...], str]  # the shape of a tensor, and the name of its dtype


class HfHeaders:
    """A folder of weights. Its names are read on construction, shapes and dtypes on request."""

    def __init__(self, location: Location) -> None:
        """Raises UserError if it is not a folder of safetensors, or if its index lists missing files."""
        self.path = local(location)
        if is_url(location) and not str(location).startswith("file://"):
            fix = "copy the folder to a disk of this machine first"
            raise UserError(Problem(str(location), "Hugging Face weights are read from files, not from a URL", fix=fix))
        if not os.path.isdir(self.path):
            raise UserError(_no_folder(self.path))
        if os.path.isfile(self.path / SINGLE):
            self.files = dict.fromkeys(_names_in(self.path / SINGLE), self.path / SINGLE)
        elif os.path.isfile(self.path / INDEX):
            self.files = _read_index(self.path / INDEX)
        else:
            raise UserError(_no_weights(self.path))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.files)

    @property
    def config_file(self) -> str:
        return str(self.path / CONFIG)

    def raw_config(self) -> dict[str, Any]:
        """The content of `config.json`. Raises UserError if it is missing or is not a JSON object."""
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
        return config

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Shapes and dtypes by name; each file is opened once. Raises UserError for damaged files and other dtypes."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        found: dict[str, Header] = {}
        for path, inside in wanted.items():
            with open_safetensors(path, "np") as file:
                for name in inside:
                    part = file.get_slice(name)
                    if (form := part.get_dtype()) not in FORMS:
                        what, allowed = f"{name} has dtype {form}, which is not supported", ", ".join(FORMS)
                        raise UserError(Problem(str(path), what, allowed=allowed))
                    found[name] = tuple(part.get_shape()), form
        return found


def refuse_other_names(source: HfHeaders, names: TensorNames, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if a folder does not have exactly the model's tensors, or if a shape in `wanted` differs."""
    theirs = {names.hf_name(name) for name in names.shapes}
    missing = sorted(theirs - source.names)
    surplus = sorted(name for name in source.names - theirs if not names.is_optional(name))
    shapes = {names.hf_name(name): shape for name, shape in wanted.items()}
    there = source.headers(sorted(shapes.keys() & source.names))
    reshaped = compare_shapes(shapes, {name: shape for name, (shape, _) in there.items()}, "folder")[2]
    fix = "use the folder of the configured model, or set model.flavor and its sizes to those of the folder"
    guess = nearest(missing[0], [name for name in surplus if len(name) < NAME_SHOWN]) if missing else None
    refuse_mismatch(str(source.path), missing, surplus, reshaped, fix, guess)


def refuse_mismatch(
    where: str,
    missing: Sequence[str],
    surplus: Sequence[str],
    reshaped: Sequence[str],
    fix: str,
    guess: str | None = None,
) -> None:
    """Raises one UserError with all mismatches, if there are any."""
    missing, surplus, reshaped = (
        [shortened(one, NAME_SHOWN) for one in names] for names in (missing, surplus, reshaped)
    )
    problems = [
        *(replace(problem, nearest=guess) for problem in mismatches(where, [(MISSING, missing)], fix)),
        *mismatches(where, [(SURPLUS, surplus), (RESHAPED, reshaped)], fix),
    ]
    if problems:
        raise UserError(*problems)


@contextmanager
def open_safetensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file. Converts errors of the library, and those of opening, to a UserError: a damaged file."""
    is_open = False
    try:
        with safe_open(str(path), framework=framework) as file:
            is_open = True
            yield file
    except (SafetensorError, OSError) as error:
        if is_open and isinstance(error, OSError):  # the disk's, of the caller's work
            raise
        what = f"damaged or incomplete: {shortened(error, 300)}"
        raise UserError(Problem(str(path), what, fix=DOWNLOAD_AGAIN)) from error


def _names_in(path: Path) -> list[str]:
    with open_safetensors(path, "np") as file:
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
