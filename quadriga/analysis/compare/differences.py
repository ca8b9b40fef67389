"""The differences between runs, and whether the runs may be compared.

Every key of `config.toml` counts except those that only change where a run writes and what it prints (`IGNORED_KEYS`).
Of `environment.json`, only what affects speed or numerics counts (`DECISIVE_ENVIRONMENT`). Other differences, such as
another host, are warnings. Settings may differ in the varied keys: for a bench its `--vary` keys, otherwise the
accepted keys, or the only key that differs. Repeats of a setting may differ only in accepted keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quadriga.analysis.compare.runs import Flat, RunFolder, Setting
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import format_some

IGNORED_KEYS = frozenset(
    {"job.dump_folder", "job.description", "job.print_config", "job.save_config_file", "checkpoint.folder"}
)
DECISIVE_ENVIRONMENT = (
    *("quadriga", "git.commit", "libraries.torch", "cuda", "nccl", "devices", "cpu.architecture"),
    *("world_size", "backend", "backends", "cpu.threads_per_rank"),
    *(f"environment.{name}" for name in ("NNODES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF")),
)
# Reported elsewhere, or without effect.
UNREPORTED_ENVIRONMENT = ("command", "environment.COMM_BACKEND", "environment.LOG_RANK")
BACKEND_KEY = "comm.backend"
# What follows from a varied key, and so differs too.
IMPLIED_KEYS = {BACKEND_KEY: ("environment.backend", "environment.backends")}
# Settings that differ in one of these train on other batches.
DATASET_KEYS = (
    *("training.dataset", "training.dataset_path", "training.dataset_text_field", "training.dataset_template"),
    *("training.dataset_config", "training.dataset_split", "training.dataset_streaming", "training.token_format"),
    *("training.token_dtype", "training.token_eos_id", "training.dataset_prompt", "training.packing"),
    *("training.document_mask", "model.hf_assets_path"),
)
MIXTURE_KEYS = ("training.sources", "training.stages")
DATA_KEYS = frozenset({*DATASET_KEYS, *MIXTURE_KEYS, "debug.seed", "training.global_batch_size", "training.seq_len"})
MISSING_VALUE = "(missing)"
MAX_REPORTED = 20  # keys or warnings of one report


@dataclass(frozen=True)
class SettingDifferences:
    """`varied`: key -> values in the order of the settings. `warnings`: other differences, which may not matter."""

    varied: dict[str, list[Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def data_keys(self) -> list[str]:
        """The varied keys that give the settings other batches."""
        return sorted(DATA_KEYS & self.varied.keys())


def find_differences(
    settings: Sequence[Setting], varied: Sequence[str] | None, accepted: Sequence[str]
) -> SettingDifferences:
    """The differences between settings.

    Args:
        varied: the keys that a bench varied; None for other runs.
        accepted: further keys that may differ.

    Raises:
        UserError: repeats of a setting differ, settings differ in more than was varied, or an accepted key does not
            differ.
    """
    first, *others = [run for setting in settings for run in setting.runs]
    anywhere = {key for other in others for key in decisive_keys(first, other)}
    for key in accepted:
        if key not in anywhere:
            allowed = format_some(sorted(anywhere), 20) or "they do not differ"
            raise UserError(Problem("--accept-difference", "the runs do not differ in this", key, allowed=allowed))
    for setting in settings:
        refuse_differing_repeats(setting, accepted)
    firsts = [setting.runs[0] for setting in settings]
    unlike = {key for other in firsts[1:] for key in decisive_keys(firsts[0], other)}
    named = [*(varied or ()), *(key for key in accepted if key in unlike)]
    followers = [follower for key in (*named, *unlike) for follower in IMPLIED_KEYS.get(key, ())]
    rest = sorted(key for key in unlike if key not in named and not key.startswith(tuple(followers) or "\0"))
    if rest and (varied is not None or accepted or len(rest) > 1):
        problems = [_problem(key, settings) for key in rest[:MAX_REPORTED]]
        if len(rest) > MAX_REPORTED:
            problems.append(Problem("RUN", f"the runs differ in {len(rest) - MAX_REPORTED:,} more keys"))
        raise UserError(*problems)
    kept = [*named, *rest]
    return SettingDifferences({key: [_value(first, key) for first in firsts] for key in kept}, _remarks(settings))


def refuse_differing_repeats(setting: Setting, accepted: Sequence[str]) -> None:
    first, *others = setting.runs
    for other in others:
        for key in decisive_keys(first, other):
            if key in accepted:
                continue
            what = ", ".join(f"{shortened(_value(run, key))} in {run.folder.name}" for run in (first, other))
            fix = f"remove the repeats that differ, or, if the difference is intended: --accept-difference {key}"
            raise UserError(Problem(str(setting.folder), f"its repeats differ in {key}: {what}", fix=fix))


def decisive_keys(one: RunFolder, other: RunFolder) -> list[str]:
    """The keys in which two runs differ and that affect what is trained or how fast."""
    config = [key for key in differing_keys(one.config, other.config) if key not in IGNORED_KEYS]
    found = differing_keys(one.environment, other.environment) if one.environment and other.environment else []
    return [*config, *(f"environment.{key}" for key in found if _within(key, DECISIVE_ENVIRONMENT))]


def differing_keys(one: Flat, other: Flat) -> list[str]:
    keys = one.keys() | other.keys()
    return sorted(key for key in keys if one.get(key, MISSING_VALUE) != other.get(key, MISSING_VALUE))


def _remarks(settings: Sequence[Setting]) -> list[str]:
    """One warning per non-decisive key of the environments that differs."""
    runs = [run for setting in settings for run in setting.runs if run.environment]
    keys = {key for run in runs[1:] for key in differing_keys(runs[0].environment, run.environment)}
    remarks = []
    for key in sorted(key for key in keys if not _within(key, (*DECISIVE_ENVIRONMENT, *UNREPORTED_ENVIRONMENT))):
        values = dict.fromkeys(shortened(run.environment.get(key, MISSING_VALUE)) for run in runs)
        remarks.append(f"the runs differ in environment.{shortened(key)}: {format_some(list(values))}")
    if len(remarks) > MAX_REPORTED:
        remarks[MAX_REPORTED:] = [f"the runs differ in {len(remarks) - MAX_REPORTED:,} more keys of their environments"]
    if any(run.environment.get("git.changed") for run in runs):
        remarks.append("the code was changed since its commit, and may have changed between the runs")
    return remarks


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(run: RunFolder, key: str) -> Any:
    source = run.environment if key.startswith("environment.") else run.config
    return source.get(key.removeprefix("environment."), MISSING_VALUE)


def _problem(key: str, settings: Sequence[Setting]) -> Problem:
    values = "; ".join(f"{setting.name}: {shortened(_value(setting.runs[0], key))}" for setting in settings)
    what = f"the runs differ in more than was varied ({values})"
    fix = f"compare runs with the same value, or, if the difference is intended: --accept-difference {key}"
    return Problem(shortened(key, 200), shortened(what, 400), fix=shortened(fix, 400))
