"""Shared by `tokenize` and `data`: which data an argument names, and messages that name arguments instead of keys."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from quadriga.cli.arguments import Parser
from quadriga.config.assets import DATASETS, REMOTE, data_files, dataset_problem, is_remote
from quadriga.config.schema import TEXT_FIELD, TOKENS, TextKeys
from quadriga.errors import Problem, UserError, shortened

ARGUMENTS = {
    "training.dataset_text_field": "--field",
    "training.dataset_template": "--template",
    "training.dataset_config": "--config",
    "training.dataset_split": "--split",
    "training.dataset_streaming = false": "--download",
    "training.dataset_streaming": "--download",
    "training.dataset_path": "SOURCE",
    "training.dataset": "--dataset",
    "training.seq_len": "--seq-len",
    "model.hf_assets_path": "--tokenizer",
    "training.token_format": "--token-format",
    "training.token_dtype": "--token-dtype",
    "training.token_eos_id": "--token-eos-id",
}


def add_text_arguments(parser: Parser) -> None:
    """The arguments of `text_keys`, except `--field`."""
    parser.add_argument("--template", metavar="TEXT", help="as training.dataset_template, instead of --field")
    parser.add_argument("--config", metavar="NAME", help="of a data set of the Hub (--dataset hub)")
    parser.add_argument("--split", metavar="NAME", help="of a data set of the Hub, or of a folder of save_to_disk")
    parser.add_argument("--download", action="store_true", help="download a data set of the Hub first, once")


def text_keys(dataset: str, path: str | None, chosen: Namespace) -> TextKeys:
    """Which texts arguments name."""
    field, template = chosen.field or TEXT_FIELD, chosen.template
    return TextKeys(dataset, path, "training", field, template, chosen.config, chosen.split, not chosen.download)


@contextmanager
def arguments_in_messages(names: Mapping[str, str] = ARGUMENTS) -> Iterator[None]:
    """In the problems that the body raises, replaces keys of the configuration by the arguments that set them."""
    try:
        yield
    except UserError as error:
        renamed = UserError(*(_renamed(problem, names) for problem in error.problems))
        raise renamed from error


def _renamed(problem: Problem, names: Mapping[str, str]) -> Problem:
    texts = {field.name: getattr(problem, field.name) for field in fields(problem)}
    for key, argument in names.items():
        texts = {name: text if text is None else text.replace(key, argument) for name, text in texts.items()}
    return Problem(**texts)


def data_named(source: str, dataset: str | None, kinds: Callable[[str], bool]) -> tuple[str, str | None]:
    """The data set and the path that SOURCE and `--dataset` name. `kinds`: whether the command reads a data set.

    Raises UserError: there is no such data, or the data set is not clear.
    """
    if dataset is None:
        if source in DATASETS and DATASETS[source].path != "needed":
            return source, None
        dataset = _recognized(source, kinds)
    has_path = dataset not in DATASETS or DATASETS[dataset].path == "needed" or source != dataset
    path = source if has_path else None
    if (problem := dataset_problem("training.dataset", dataset, path, None)) is not None:
        raise UserError(problem)
    return dataset, path


def _recognized(source: str, kinds: Callable[[str], bool]) -> str:
    """The one data set that reads files at this path, by their names."""
    named = [name for name, kind in DATASETS.items() if kind.path == "needed" and kinds(name)]
    found = [name for name in named if any(path.is_file() for path in data_files(name, source))]
    if is_remote(source):
        found = [name for name in named if name in REMOTE and source.lower().endswith(DATASETS[name].suffixes)]
    elif not Path(source).expanduser().is_dir():  # a file that is named is read whatever its suffix is
        found = [name for name in found if _fits(name, source)]
    if TOKENS in found and (Path(source).expanduser() / "manifest.json").is_file():
        found = [TOKENS]
    if len(found) == 1:
        return found[0]
    what = f"has files of several kinds: {', '.join(found)}" if found else "has no file whose name says how to read it"
    if not found and not Path(source).expanduser().exists():
        what = "there is no such file, folder or data set"
    local = [name for name in DATASETS if DATASETS[name].path != "needed" and kinds(name)]
    allowed = f"a file, a folder or a glob, or one of {', '.join(local)}"
    fix = f"set --dataset to one of {', '.join(named)}" if found or Path(source).expanduser().exists() else None
    raise UserError(Problem("SOURCE", what, shortened(source, 400), allowed=allowed, fix=fix))


def _fits(dataset: str, source: str) -> bool:
    named = data_files(dataset, source)
    return bool(named) and all(path.name.lower().endswith((*DATASETS[dataset].suffixes, ".idx")) for path in named)
