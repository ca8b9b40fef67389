"""The comparison of settings as one object for JSON (format `quadriga-compare-1`, see docs/comparisons.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from quadriga.analysis.compare.differences import BACKEND_KEY, SettingDifferences, find_differences
from quadriga.analysis.compare.evidence import (
    EXPOSED,
    Analyse,
    SettingTraces,
    analyse_setting,
    exposed_part_name,
    time_by_part,
    traced_axes,
    verify_backend,
)
from quadriga.analysis.compare.runs import RunFolder, Setting, is_comparable
from quadriga.analysis.compare.statistics import FEWEST_PAIRS, Ratio, median, middle_half, paired_ratio
from quadriga.errors import Problem, UserError

FORMAT = "quadriga-compare-1"
SPEED = ("faster", "slower")
STEP_TIME, THROUGHPUT = "step_time_s", "tokens_per_second"
TOO_FEW, NO_DIFFERENCE, NOT_VERIFIED = "too few runs", "no difference shown", "not credited"

Values = dict[int, list[float]]  # of one setting, by number of the repeat


@dataclass(frozen=True)
class Metric:
    """A figure of the comparison. `verdicts`: for a run with a better and with a worse value than the first setting.
    `is_peak`: the value of a run is the largest of its windows."""

    name: str
    unit: str
    lower_is_better: bool
    verdicts: tuple[str, str] = ("better", "worse")
    is_peak: bool = False

    def values(self, run: RunFolder) -> list[float]:
        values = run.window_values(LOGGED_NAMES.get(self.name, self.name))
        return [max(values)] if self.is_peak and values else values


LOGGED_NAMES = {STEP_TIME: "step_seconds"}  # of figures whose name in the records differs
COMPARED_METRICS = (
    *(Metric(STEP_TIME, "s", True, SPEED), Metric(THROUGHPUT, "tokens/s", False, SPEED)),
    *(Metric("tflops", "TFLOP/s per device", False), Metric("mfu", "share", False)),
    *(Metric(f"memory_{kind}_gib", "GiB", True, is_peak=True) for kind in ("reserved", "active", "peak")),
    Metric("data_wait_share", "share", True),
)


def compare_settings(
    settings: Sequence[Setting],
    *,
    varied: Sequence[str] | None,
    accepted: Sequence[str],
    analyse: Analyse,
    warmup: int,
) -> dict[str, Any]:
    """Compare each setting with the first.

    Args:
        settings: at least two, with different names.
        varied: the keys that a bench varied; None for other runs.
        accepted: further keys that may differ.
        analyse: analyses the traces of a run folder (`analysis.trace.analysis`); raises UserError if it cannot.
        warmup: number of excluded first steps of each run, for the report.

    Raises:
        UserError: the settings differ in more than was varied, or have no round in common.
    """
    unlike = find_differences(settings, varied, accepted)
    rounds = common_rounds(settings)
    traces = {setting.name: analyse_setting(setting, analyse) for setting in settings}
    verifications = [verify_backend(setting, traces[setting.name]) for setting in settings]
    is_varied = BACKEND_KEY in unlike.varied
    unverified = {each["run"] for each in verifications if is_varied and not each["credited"]}
    reasons = {name: each.why_missing() for name, each in traces.items() if each.missing}
    return {
        "format": FORMAT,
        "varied": {key: list(dict.fromkeys(map(_plain, values))) for key, values in unlike.varied.items()},
        "runs": [
            {
                "name": setting.name,
                "folder": str(setting.folder),
                "values": {key: _plain(values[place]) for key, values in unlike.varied.items()},
                "repeats": len(setting.runs),
                "warnings": _warnings(setting),
            }
            for place, setting in enumerate(settings)
        ],
        "refused": None,
        "headline": headline_metric(settings),
        "warmup_steps": warmup,
        "comparisons": len(settings) - 1,
        "figures": compare_metrics(settings, rounds, traces, unverified),
        "losses": compare_losses(settings, unlike),
        "where": time_by_part(settings, traces),
        "backend": verifications,
        "not_measurable": {"where": "; ".join(f"{name}: {why}" for name, why in reasons.items())} if reasons else {},
        "warnings": [*unlike.warnings, *order_warnings(settings, rounds)],
    }


def _plain(value: Any) -> Any:
    """The value, or its text if it is not hashable, such as a list."""
    return value if isinstance(value, str | int | float | bool) else str(value)


def _warnings(setting: Setting) -> list[str]:
    many = len(setting.runs) > 1
    left_out = [f"{name} has not finished, and is excluded" for name in setting.unfinished]
    return left_out + [f"{run.folder.name}: {line}" if many else line for run in setting.runs for line in run.warnings]


def headline_metric(settings: Sequence[Setting]) -> str:
    """The figure that ranks settings: step time, or tokens per second if tokens per step differ."""
    sizes = {tokens_per_step(run) for setting in settings for run in setting.runs}
    return STEP_TIME if len(sizes) == 1 else THROUGHPUT


def tokens_per_step(run: RunFolder) -> int:
    last = run.records[-1]
    return int(last["tokens_seen"] // last["step"])


def common_rounds(settings: Sequence[Setting]) -> list[int]:
    """The numbers of the repeats that every setting has. Raises UserError if there are none."""
    numbers = [{run.number for run in setting.runs} for setting in settings]
    common = set.intersection(*numbers)
    if not common:
        what = "; ".join(f"{setting.name} has {sorted(own)}" for setting, own in zip(settings, numbers, strict=True))
        raise UserError(Problem("RUN", f"no round is common to all settings: {what}", fix="repeat the missing runs"))
    return sorted(common)


def compare_metrics(
    settings: Sequence[Setting], rounds: Sequence[int], traces: Mapping[str, SettingTraces], unverified: set[str]
) -> list[dict[str, Any]]:
    """The figures that every run has, those of the traces last."""
    found = []
    for metric in COMPARED_METRICS:
        values = [{run.number: metric.values(run) for run in setting.runs} for setting in settings]
        found.append(_compared(metric, settings, values, rounds, unverified))
    for axis in (None, *traced_axes(traces.values())):
        name = EXPOSED if axis is None else exposed_part_name(axis)
        seconds = [traces[setting.name].part_seconds(name, axis) for setting in settings]
        values = [{number: [value] for number, value in own.items()} for own in seconds]
        found.append(_compared(Metric(name, "s", True), settings, values, rounds, unverified))
    return [each for each in found if each is not None]


def _compared(
    metric: Metric,
    settings: Sequence[Setting],
    values: Sequence[Values],
    rounds: Sequence[int],
    unverified: set[str],
) -> dict[str, Any] | None:
    """One figure of all settings, each compared with the first; None if a run does not have it."""
    if any(not own.get(number) for own in values for number in rounds):
        return None
    by_run = []
    medians = [[median(own[number]) for number in rounds] for own in values]
    for setting, own, samples in zip(settings, values, medians, strict=True):
        spread = list(middle_half([value for number in rounds for value in own[number]]))
        by_run.append({"run": setting.name, "median": median(samples), "spread": spread, "samples": samples})
    ratios = []
    if all(value > 0 for samples in medians for value in samples):
        first = settings[0].name
        for setting, samples in zip(settings[1:], medians[1:], strict=True):
            ratio = paired_ratio(samples, medians[0], comparisons=len(settings) - 1)
            is_unverified = bool(unverified & {setting.name, first})
            ratios.append(_ratio(metric, setting.name, first, ratio, is_unverified))
    about = {"name": metric.name, "unit": metric.unit, "lower_is_better": metric.lower_is_better}
    return {**about, "by_run": by_run, "ratios": ratios}


def _ratio(metric: Metric, run: str, against: str, ratio: Ratio, is_unverified: bool) -> dict[str, Any]:
    if ratio.pairs < FEWEST_PAIRS:
        verdict = TOO_FEW
    elif not ratio.is_significant:
        verdict = NO_DIFFERENCE
    else:
        better = (ratio.ratio < 1) == metric.lower_is_better
        verdict = NOT_VERIFIED if is_unverified else metric.verdicts[0 if better else 1]
    interval = None if ratio.interval is None else list(ratio.interval)
    return {"run": run, "against": against, **vars(ratio), "interval": interval, "verdict": verdict}


def compare_losses(settings: Sequence[Setting], unlike: SettingDifferences) -> dict[str, Any]:
    """Loss curves at the steps that all runs logged (medians of repeats), and the largest difference of two settings.
    `largest_within_a_setting`: the largest difference of two repeats of a setting."""
    logged = [set(run.losses) for setting in settings for run in setting.runs]
    steps = sorted(set.intersection(*logged))
    losses = {setting.name: [_finite_losses(setting, step) for step in steps] for setting in settings}
    curves = {name: [median(values) if values else None for values in own] for name, own in losses.items()}
    differences: list[dict[str, Any]] = [
        {"step": step, "value": abs(one - other), "between": [a, b]}
        for a, b in combinations(curves, 2)
        for step, one, other in zip(steps, curves[a], curves[b], strict=True)
        if one is not None and other is not None
    ]
    within = [max(values) - min(values) for own in losses.values() for values in own if len(values) > 1]
    odd = sum(value is None for curve in curves.values() for value in curve)
    notes = []
    if unlike.data_keys:
        notes.append(f"not comparable: the settings read different batches ({', '.join(unlike.data_keys)})")
    if odd:
        notes.append(f"{odd} losses are NaN or infinite and are excluded")
    return {
        "steps": steps,
        "by_run": [{"run": name, "loss": curve} for name, curve in curves.items()],
        "largest_difference": max(differences, key=lambda each: each["value"], default=None),
        "largest_within_a_setting": max(within, default=None),
        "note": "; ".join(notes) or None,
    }


def _finite_losses(setting: Setting, step: int) -> list[float]:
    """The losses of all repeats; [] if one is not comparable."""
    values = [run.losses[step] for run in setting.runs]
    return values if all(map(is_comparable, values)) else []


def order_warnings(settings: Sequence[Setting], rounds: Sequence[int]) -> list[str]:
    """Warnings about runs that overlapped or were not interleaved, and about widened intervals."""
    runs = {number: [run for s in settings for run in s.runs if run.number == number] for number in rounds}
    warnings = []
    in_time = sorted((run.span for own in runs.values() for run in own), key=lambda span: span[0])
    if any(after[0] < before[1] for before, after in pairwise(in_time)):
        warnings.append("runs overlapped in time, so they may have slowed each other")
    spans = [(min(run.span[0] for run in own), max(run.span[1] for run in own)) for own in runs.values()]
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        warnings.append("the runs were not interleaved, so a drift of the machine counts as a difference of settings")
    firsts = {min(own, key=lambda run: run.span[0]).folder.parent for own in runs.values()}
    if len(rounds) >= FEWEST_PAIRS and len(firsts) == 1:
        warnings.append("the same setting was always first, so the cost of the start of a round counts against it")
    if len(settings) > 2:
        what = f"{len(settings) - 1} settings are compared with the first"
        warnings.append(f"{what}: each interval is widened so that all hold at once")
    return warnings
