"""The entry point of configuration: `read` turns a command line and an environment into a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quadriga.config.assets import BUILTIN_TOKENIZER, dataset_problem, missing_files, tokenizer_facts
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.legacy_keys import started_with, value_in
from quadriga.config.load import LoadedConfig, load
from quadriga.config.resolve import Catalogue, checkpoint_folder, resolve
from quadriga.config.rules_layout import FROM_CHECKPOINT
from quadriga.config.run_spec import BackendFacts, RunSpec, TokenizerFacts
from quadriga.config.schema import JobConfig, Training, TrainingSource, Validation, ValidationSet
from quadriga.errors import Problem, UserError
from quadriga.limits import CSV_BYTES
from quadriga.reading import read_text

BATCH, SEED, COMPILE = "training.global_batch_size", "debug.seed", "compile.enable"
Saved = Callable[[str, int], Mapping[str, Any] | None]  # takes a folder and a step; -1 is the newest


@dataclass(frozen=True)
class Run:
    """A valid configuration: its keys (`config`), what follows from them (`spec`), and their sources (`origin`)."""

    config: JobConfig
    spec: RunSpec
    origin: Mapping[str, str]

    def on_device(self, device_type: str) -> Run:
        """The run with `compile.enable = "auto"` decided for `cuda` or `cpu`. Where the configuration decides it,
        `resolve` has done so."""
        if self.config.compile.enable != "auto":
            return self
        compile = self.config.compile.model_copy(update={"enable": device_type == "cuda"})
        return replace(self, config=self.config.model_copy(update={"compile": compile}))


def read(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    catalogue: Catalogue,
    backends: Mapping[str, BackendFacts],
    world_size: int | None,
    training: bool,
    saved: Saved | None = None,
) -> Run:
    """Read, check and resolve a configuration.

    Args:
        argv: the command line without the program's name; `--job.config_file` names the TOML file.
        environ: the environment; COMM_BACKEND is read.
        catalogue: model families by name, each with its sizes by flavor.
        backends: facts about each communication backend, by name.
        world_size: number of ranks; None: the product of the degrees.
        training: False for a dry run, in which missing files and unsupported features are notices. A configuration
            that only rehearses is read in the same way.
        saved: returns the metadata of the checkpoint of a step (-1: the newest) in a folder, or None. A resumed run
            keeps what it was started with: a global batch of -1, the choice of `compile.enable = "auto"`, and each key
            whose default has changed since.

    Raises:
        UserError: with all problems that were found.
    """
    loaded = load(argv, environ)
    training = training and not loaded.config.only_rehearses
    _inherit_from_checkpoint(loaded, saved)
    tokenizer, problems, notices = _check_assets(loaded, training)
    schedule_csv, broken = _read_schedule(loaded)
    resolved = resolve(
        loaded,
        catalogue=catalogue,
        backends=backends,
        tokenizer=tokenizer,
        world_size=world_size,
        training=training,
        schedule_csv=schedule_csv,
    )
    problems = [*broken, *problems]
    found = [*loaded.problems, *resolved.problems, *problems]
    if found or resolved.spec is None:
        raise UserError(*found)
    spec = replace(resolved.spec, notices=(*loaded.notices, *resolved.notices, *notices))
    return Run(loaded.config, spec, loaded.origin)


def _inherit_from_checkpoint(loaded: LoadedConfig, saved: Saved | None) -> None:
    """Take from the checkpoint that the run resumes from what the user does not set and what may have changed since."""
    try:
        place, checkpoint = _checkpoint_of(loaded.config, saved)
    except UserError as error:  # a folder that cannot be listed
        loaded.problems += error.problems
        return
    if checkpoint is None:
        return
    rows = checkpoint.get("global_batch_size")
    if loaded.config.training.global_batch_size == -1 and BATCH not in loaded.bad and type(rows) is int and rows >= 1:
        _set_from_checkpoint(loaded, BATCH, rows, place)
        loaded.notices.append(f"{BATCH} = -1 is {rows}, the value of the checkpoints in {place}")
    if SEED not in loaded.origin and checkpoint.get("seed") == loaded.config.debug.seed:
        _set_from_checkpoint(loaded, SEED, loaded.config.debug.seed, place)
    compiled = value_in(checkpoint.get("config"), COMPILE, None)
    if loaded.config.compile.enable == "auto" and type(compiled) is bool:
        _set_from_checkpoint(loaded, COMPILE, compiled, place)
        loaded.notices.append(f'{COMPILE} = "auto" is {format_toml(compiled)}, the value of the checkpoints in {place}')
    for key, value in started_with(checkpoint).items():
        # An invalid value is reported when the checkpoint is compared with the run.
        if key in loaded.origin or value == KEYS[key].default or not _is_valid(key, value):
            continue
        _set_from_checkpoint(loaded, key, value, place)
        loaded.notices.append(
            f"{key} stays {format_toml(value)}, the value that the run in {place} was started with (the default is now "
            f"{format_toml(KEYS[key].default)}; set the key to change it)"
        )


def _checkpoint_of(config: JobConfig, saved: Saved | None) -> tuple[str, Mapping[str, Any] | None]:
    """The folder and the metadata of the checkpoint that the run resumes from with optimizer and schedule."""
    section, folder = config.checkpoint, checkpoint_folder(config)
    if saved is None or not section.enable or section.create_seed_checkpoint:
        return folder, None
    checkpoint, elsewhere = saved(folder, section.load_step), section.initial_load_path
    if checkpoint is not None or elsewhere is None or section.initial_load_model_only or section.initial_load_in_hf:
        return folder, checkpoint
    return elsewhere, saved(elsewhere, -1)


def _set_from_checkpoint(loaded: LoadedConfig, key: str, value: Any, place: str) -> None:
    """Set a key to the value of the checkpoints in `place`."""
    table, _, name = key.rpartition(".")
    loaded.update(table, **{name: value})
    loaded.origin[key] = f"{FROM_CHECKPOINT}{place}"


def _is_valid(key: str, value: Any) -> bool:
    try:
        KEYS[key].section.model_validate({key.rpartition(".")[2]: value})
    except ValidationError:
        return False
    return True


def _read_schedule(loaded: LoadedConfig) -> tuple[str | None, list[Problem]]:
    """The text of the pipeline's CSV file. If it cannot be read, its key is added to `loaded.bad`."""
    key = "parallelism.pipeline_parallel_schedule_csv"
    path = loaded.config.parallelism.pipeline_parallel_schedule_csv
    if path is None or loaded.config.parallelism.pipeline_parallel_degree == 1:
        return None, []
    try:
        return read_text(path, CSV_BYTES, what="file"), []
    except UserError as error:
        loaded.bad.add(key)
        origin = loaded.origin.get(key, "default")
        return None, [replace(each, where=key, value=path, source=origin) for each in error.problems]


def _check_assets(loaded: LoadedConfig, training: bool) -> tuple[TokenizerFacts, list[Problem], list[str]]:
    """Check tokenizer and data. What is missing is a problem in training, and a notice in a dry run."""
    config, origin = loaded.config, loaded.origin
    wrong: list[Problem] = []
    missing: list[Problem] = []
    path = config.model.hf_assets_path
    tokenizer = TokenizerFacts("missing", path, None)
    if path == BUILTIN_TOKENIZER and not config.training.reads_text:
        tokenizer = TokenizerFacts("none", path, None)  # the default, which does not belong to the ids
    elif "model.hf_assets_path" not in loaded.bad:
        try:
            tokenizer = tokenizer_facts(path)
        except UserError as error:
            wrong += error.problems
        else:
            if tokenizer.kind == "missing":
                missing.append(_no_tokenizer(path, origin.get("model.hf_assets_path", "default")))
    for key, dataset, files, sources in _data_sets(loaded):
        if (problem := dataset_problem(key, dataset, files, sources[0])) is not None:
            wrong.append(problem)
        elif files is not None and (problem := missing_files(key, dataset, files, sources[1])) is not None:
            missing.append(problem)
    tokenizer_notices = list(tokenizer.notices)
    if training:
        return tokenizer, [*wrong, *missing], tokenizer_notices
    return (
        tokenizer,
        wrong,
        tokenizer_notices + [f"{problem.where} = {problem.value}: {problem.what}" for problem in missing],
    )


def _data_sets(loaded: LoadedConfig) -> Iterator[tuple[str, str, str | None, tuple[str, str | None]]]:
    """Key, name and path of each data set whose keys are valid, and where name and path were set."""
    training, validation, origin = loaded.config.training, loaded.config.validation, loaded.origin
    read: list[tuple[str, Training | Validation, tuple[TrainingSource | ValidationSet, ...]]]
    read = [("training.sources", training, training.sources)]
    read += [("validation.sets", validation, validation.sets)] if validation.enable else []
    for table, section, tables in read:
        given = origin.get(table, "default")
        for each in tables:
            yield f"{each.table}.dataset", each.dataset, each.dataset_path, (given, given)
        key = f"{table.partition('.')[0]}.dataset"
        if not tables and not {table, key, f"{key}_path"} & loaded.bad:
            yield key, section.dataset, section.dataset_path, (origin.get(key, "default"), origin.get(f"{key}_path"))


def _no_tokenizer(path: str, source: str) -> Problem:
    folder = Path(path)
    if folder.name.startswith("Llama-"):
        fix = f"python scripts/download_hf_assets.py --repo_id meta-llama/{folder.name} --local_dir {folder.parent}"
    else:
        fix = "put one there; `python scripts/download_hf_assets.py` downloads that of Llama 3.1 to ./assets/hf"
    what = "no tokenizer is there (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)"
    return Problem("model.hf_assets_path", what, path, source, "a folder or file, or builtin:bytes", fix=fix)
