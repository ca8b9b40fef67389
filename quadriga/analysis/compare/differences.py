"""In what runs differ, and whether they may be compared all the same.

Every key of `config.toml` counts but those that say where a run writes and what it prints (`NO_MATTER`). Of
`environment.json` what decides over speed and numbers counts (`DECISIVE`); other differences, another host of the same
kind among them, are warnings. Between settings, what was varied may differ: for a bench its varied keys, otherwise what
the user accepts, or, where the runs differ in one single key, that one; between the repeats of a setting, what the user
accepts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quadriga.analysis.compare.runs import Flat, RunFolder, Setting
from quadriga.errors import Problem, UserError, shortened
from quadriga.units import show_some

NO_MATTER = frozenset(
    {"job.dump_folder", "job.description", "job.print_config", "job.save_config_file", "checkpoint.folder"}
)
DECISIVE = (
    "quadriga",
    "git.commit",
    "libraries.torch",
    "cuda",
    "nccl",
    "devices",
    "world_size",
    "backend",
    "backends",
    "cpu.architecture",
    "cpu.threads_per_rank",
    "environment.NNODES",
    "environment.OMP_NUM_THREADS",
    "environment.PYTORCH_ALLOC_CONF",
)
UNSAID = ("command", "environment.COMM_BACKEND", "environment.LOG_RANK")  # said elsewhere, or of no effect
BACKEND = "comm.backend"
# What follows from a varied key and so differs with it.
FOLLOWS = {BACKEND: ("environment.backend", "environment.backends")}
# Whoever varies one of these gives his settings other batches to learn from.
DATA = frozenset(
    {
        "debug.seed",
        "model.hf_assets_path",
        "training.dataset",
        "training.dataset_path",
        "training.dataset_text_field",
        "training.global_batch_size",
        "training.seq_len",
    }
)
ABSENT = "(not said)"
MOST_TOLD = 20  # keys or remarks of one report


@dataclass(frozen=True)
class Differences:
    """`varied`: key -> the value of each setting in their order. `warnings`: what else differs and may not matter."""

    varied: dict[str, list[Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def of_the_data(self) -> list[str]:
        """The varied keys that give the settings other batches."""
        return sorted(DATA & self.varied.keys())


def differences(settings: Sequence[Setting], varied: Sequence[str] | None, accepted: Sequence[str]) -> Differences:
    """What differs between settings.

    Args:
        varied: the keys that a bench varied; None for runs that were not made by one.
        accepted: further keys that the user lets differ.

    Raises:
        UserError: the repeats of a setting differ, or the settings do in more than was varied; or an accepted key does
            not differ.
    """
    first, *others = [run for setting in settings for run in setting.runs]
    anywhere = {key for other in others for key in decisive(first, other)}
    for key in accepted:
        if key not in anywhere:
            allowed = show_some(sorted(anywhere), 20) or "they do not differ"
            raise UserError(Problem("--accept-difference", "the runs do not differ in this", key, allowed=allowed))
    for setting in settings:
        refuse_unlike_repeats(setting, accepted)
    firsts = [setting.runs[0] for setting in settings]
    unlike = {key for other in firsts[1:] for key in decisive(firsts[0], other)}
    named = [*(varied or ()), *(key for key in accepted if key in unlike)]
    followers = [follower for key in (*named, *unlike) for follower in FOLLOWS.get(key, ())]
    rest = sorted(key for key in unlike if key not in named and not key.startswith(tuple(followers) or "\0"))
    if rest and (varied is not None or accepted or len(rest) > 1):
        problems = [_problem(key, settings) for key in rest[:MOST_TOLD]]
        if len(rest) > MOST_TOLD:
            problems.append(Problem("RUN", f"the runs differ in {len(rest) - MOST_TOLD:,} more keys"))
        raise UserError(*problems)
    kept = [*named, *rest]
    return Differences({key: [_value(first, key) for first in firsts] for key in kept}, _remarks(settings))


def refuse_unlike_repeats(setting: Setting, accepted: Sequence[str]) -> None:
    first, *others = setting.runs
    for other in others:
        for key in decisive(first, other):
            if key in accepted:
                continue
            what = f"{_show(first, key)} in {first.folder.name}, {_show(other, key)} in {other.folder.name}"
            fix = f"leave out the repeats that are not alike, or, if it is meant: --accept-difference {key}"
            raise UserError(Problem(str(setting.folder), f"its repeats differ in {key}: {what}", fix=fix))


def decisive(one: RunFolder, other: RunFolder) -> list[str]:
    """The keys in which two runs differ and that decide what is trained or how fast."""
    config = [key for key in unlike_keys(one.config, other.config) if key not in NO_MATTER]
    found = unlike_keys(one.environment, other.environment) if one.environment and other.environment else []
    return [*config, *(f"environment.{key}" for key in found if _within(key, DECISIVE))]


def unlike_keys(one: Flat, other: Flat) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key, ABSENT) != other.get(key, ABSENT))


def _remarks(settings: Sequence[Setting]) -> list[str]:
    """One line for each thing of the environments that differs and is not decisive."""
    runs = [run for setting in settings for run in setting.runs if run.environment]
    keys = {key for run in runs[1:] for key in unlike_keys(runs[0].environment, run.environment)}
    remarks = []
    for key in sorted(key for key in keys if not _within(key, (*DECISIVE, *UNSAID))):
        values = dict.fromkeys(shortened(run.environment.get(key, ABSENT)) for run in runs)
        remarks.append(f"the runs differ in environment.{shortened(key)}: {show_some(list(values))}")
    if len(remarks) > MOST_TOLD:
        remarks[MOST_TOLD:] = [f"the runs differ in {len(remarks) - MOST_TOLD:,} more keys of their environments"]
    if any(run.environment.get("git.changed") for run in runs):
        remarks.append("the code was changed since its commit, and may have changed between the runs")
    return remarks


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(run: RunFolder, key: str) -> Any:
    source = run.environment if key.startswith("environment.") else run.config
    return source.get(key.removeprefix("environment."), ABSENT)


def _show(run: RunFolder, key: str) -> str:
    return shortened(_value(run, key))


def _problem(key: str, settings: Sequence[Setting]) -> Problem:
    values = "; ".join(f"{setting.name}: {_show(setting.runs[0], key)}" for setting in settings)
    what = f"the runs differ in more than was varied ({values})"
    fix = f"compare runs that are alike in it, or, if it is meant: --accept-difference {key}"
    return Problem(shortened(key, 200), shortened(what, 400), fix=shortened(fix, 400))
