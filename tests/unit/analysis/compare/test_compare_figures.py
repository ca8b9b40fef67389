"""The comparison and its words, on run folders made by hand whose right answers are known."""

from __future__ import annotations

import json
import math

import pytest
from launching import ROOT
from run_folders import analysis, collective, make_pair, make_run, make_setting, no_traces

from quadriga.analysis.compare.comparison import compare_settings
from quadriga.analysis.compare.report import format_answers, format_comparison
from quadriga.analysis.compare.runs import names_of, read_setting
from quadriga.errors import UserError

MODE = "activation_checkpoint.mode"
ROUNDS = [1.0, 1.4, 0.9, 1.1, 1.0]  # how slow the machine was in each
NOISE = [1.0, 1.004, 0.997, 1.002, 0.999]


def compared(folders, analyse=no_traces, varied=None, warmup=5):
    names = names_of(folders, None)
    settings = [read_setting(name, folder, warmup) for name, folder in zip(names, folders, strict=True)]
    return compare_settings(settings, varied=varied, accepted=(), analyse=analyse, warmup=warmup)


def figure(found, name):
    return next(each for each in found["figures"] if each["name"] == name)


def pair(tmp_path, factor, **other):
    ours = [0.1 * slow for slow in ROUNDS]
    theirs = [factor * mine * noise for mine, noise in zip(ours, NOISE, strict=True)]
    return make_pair(tmp_path, ours, theirs, **other)


def test_a_faster_setting_is_found(tmp_path):
    found = compared(pair(tmp_path, 0.9, keys={MODE: "none"}))
    ratio = figure(found, "step_time_s")["ratios"][0]
    assert ratio["ratio"] == pytest.approx(0.9, rel=0.003)
    assert ratio["interval"][0] < 0.9 < ratio["interval"][1]
    assert (ratio["pairs"], ratio["verdict"], ratio["confidence"]) == (5, "faster", pytest.approx(0.95))
    assert figure(found, "tokens_per_second")["ratios"][0]["verdict"] == "faster"
    (answer,) = format_answers(found)
    assert answer.startswith("b is 11.1 % faster than a (95 % interval ")
    assert "5 pairs" in answer
    assert "a 0.1 s, b 0.09 s" in answer


def test_a_slower_setting_is_found(tmp_path):
    (answer,) = format_answers(compared(pair(tmp_path, 1.25, keys={MODE: "full"})))
    assert answer.startswith("b is 20.0 % slower than a (95 % interval 19.")  # 1 / 1.25 of the speed


def test_settings_that_are_as_fast_show_no_difference(tmp_path):
    found = compared(pair(tmp_path, 1.0))
    assert figure(found, "step_time_s")["ratios"][0]["verdict"] == "no difference shown"
    (answer,) = format_answers(found)
    assert answer.startswith("no difference shown between a and b (speed +0.0 %, 95 % interval -0.")


def test_two_pairs_are_too_few_to_tell(tmp_path):
    found = compared(make_pair(tmp_path, [0.1, 0.1], [0.2, 0.2]))
    ratio = figure(found, "step_time_s")["ratios"][0]
    assert (ratio["ratio"], ratio["interval"], ratio["verdict"]) == (pytest.approx(2.0), None, "too few runs")
    assert next(format_answers(found)).startswith("too few runs: 2 pairs, at least 3 are needed")


def test_medians_and_spread_are_those_of_the_counted_windows(tmp_path):
    """Steps 6 to 20 count: of one run 0.1 .. but for one slow step; the first five would have spoilt a mean."""
    slow_start = [9.0] * 5 + [0.1] * 14 + [0.7]
    make_run(tmp_path / "a", slow_start)
    make_run(tmp_path / "b", [9.0] * 5 + [0.2, 0.4] * 7 + [0.3], begins=100.0)
    first, second = figure(compared([tmp_path / "a", tmp_path / "b"]), "step_time_s")["by_run"]
    assert first == {"run": "a", "median": pytest.approx(0.1), "spread": pytest.approx([0.1, 0.1]), "samples": [0.1]}
    assert second["median"] == pytest.approx(0.3)
    assert second["spread"] == pytest.approx([0.2, 0.4])


def test_memory_is_the_peak(tmp_path):
    found = compared(pair(tmp_path, 1.0, memory=3.0))
    memory = figure(found, "memory_peak_gib")
    assert [each["median"] for each in memory["by_run"]] == [1.5, 3.0]
    assert memory["ratios"][0]["verdict"] == "worse"
    assert memory["ratios"][0]["interval"] == [pytest.approx(2.0), pytest.approx(2.0)]


def test_a_figure_that_a_run_does_not_have_is_left_out(tmp_path):
    names = [each["name"] for each in compared(pair(tmp_path, 1.0))["figures"]]
    assert "mfu" not in names  # None on a CPU
    assert "memory_reserved_gib" not in names
    assert "tflops" in names


def test_steps_of_another_size_are_compared_by_tokens(tmp_path):
    found = compared(pair(tmp_path, 2.0, tokens=1024, keys={"training.seq_len": 128}))
    assert found["headline"] == "tokens_per_second"
    assert next(format_answers(found)).startswith("no difference shown")


def test_three_settings_widen_the_intervals_and_say_so(tmp_path):
    for number, name in enumerate("abc"):
        make_setting(tmp_path / name, [0.1 * noise for noise in NOISE], first=100.0 * number, apart=300.0)
    found = compared([tmp_path / name for name in "abc"])
    ratios = figure(found, "step_time_s")["ratios"]
    assert [ratio["run"] for ratio in ratios] == ["b", "c"]
    assert all(ratio["against"] == "a" for ratio in ratios)
    assert all(ratio["confidence"] == pytest.approx(0.975) for ratio in ratios)
    assert any("each interval is widened" in warning for warning in found["warnings"])


def test_losses_lie_over_each_other_with_the_largest_difference(tmp_path):
    folders = pair(tmp_path, 1.0, loss=lambda step: 5.0 / step + (0.25 if step == 7 else 0.0))
    losses = compared(folders)["losses"]
    assert losses["steps"] == list(range(1, 21))
    assert losses["by_run"][0]["loss"][3] == 1.25
    assert losses["largest_difference"] == {"step": 7, "value": 0.25, "between": ["a", "b"]}
    assert losses["largest_within_a_setting"] == 0.0


def test_losses_of_other_logging_steps_are_compared_where_both_logged(tmp_path):
    make_run(tmp_path / "a", keys={"metrics.log_freq": 2})
    make_run(tmp_path / "b", keys={"metrics.log_freq": 3}, begins=100.0)
    assert compared([tmp_path / "a", tmp_path / "b"], warmup=3)["losses"]["steps"] == [1, 6, 12, 18, 20]


def test_a_nonfinite_loss_is_reported_and_left_out(tmp_path):
    folders = pair(tmp_path, 1.0, loss=lambda step: math.nan if step == 3 else 1.0)
    found = compared(folders)
    assert found["losses"]["by_run"][1]["loss"][2] is None
    assert "1 losses are NaN or infinite" in found["losses"]["note"]
    json.dumps(found, allow_nan=False)


def traced(folder):
    """`b` waits longer for the axis `tp`; the ranks differ, the repeats do not."""
    exposed = 0.06 if folder.parent.name == "b" else 0.02
    ranks = [{"exposed_communication_s": exposed}, {"exposed_communication_s": exposed + 0.02}]
    own = [collective("shard", "gloo", 300.0), collective("tp", "gloo", 100.0, exposed), collective("tp", "gloo", 1.0)]
    return analysis(*own, ranks=ranks)


def test_where_the_time_went(tmp_path):
    found = compared(pair(tmp_path, 1.0), analyse=traced)
    rows = {row["part"]: [each["seconds"] for each in row["by_run"]] for row in found["where"]}
    assert rows["compute_s"] == [0.08, 0.08]
    assert rows["exposed_communication_s"] == pytest.approx([0.03, 0.07])  # the mean of the ranks
    assert rows["exposed_communication_on_tp_s"] == pytest.approx([0.03, 0.07])
    assert rows["exposed_communication_on_shard_s"] == [0.01, 0.01]
    assert rows["memcpy_s"] == [None, None]
    assert figure(found, "exposed_communication_on_tp_s")["ratios"][0]["verdict"] == "worse"
    assert found["not_measurable"] == {}


def test_without_traces_where_is_not_measurable_and_says_why(tmp_path):
    found = compared(pair(tmp_path, 1.0))
    assert found["where"] is None
    assert found["not_measurable"]["where"].startswith("a: repeat 1, 2, 3, 4, 5: there are no traces")
    assert any("not measurable: a: repeat 1" in line for line in format_comparison(found))


def test_a_comparison_is_json_and_a_report(tmp_path):
    found = compared(pair(tmp_path, 0.9, keys={MODE: "none"}), analyse=traced)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    page = (ROOT / "docs/comparisons.md").read_text(encoding="utf-8")
    assert f"`{found['format']}`" in page
    assert not [key for key in found if f"`{key}`" not in page and key != "format"]
    text = "\n".join(format_comparison(again))
    assert text.startswith("b is 11.1 % faster than a")
    for part in ("varied: activation_checkpoint.mode = selective, none", "step_time_s", "memory_peak_gib"):
        assert part in text
    assert "the first 5 steps of each run are excluded" in text
    assert "losses: equal to the last digit at all 20 logged steps" in text
    assert max(map(len, text.splitlines())) < 170


def test_settings_without_a_common_round_are_refused(tmp_path):
    make_run(tmp_path / "a" / "repeat-1")
    make_run(tmp_path / "b" / "repeat-2")
    with pytest.raises(UserError, match="no round is common"):
        compared([tmp_path / "a", tmp_path / "b"])
