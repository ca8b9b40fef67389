"""Which runs may be compared, and what is said of them: on run folders made by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from run_folders import make_pair, make_run, make_setting, no_traces

from quadriga.analysis.compare.comparison import compare_settings
from quadriga.analysis.compare.runs import cycle_of, find_bench, folders_of, has_finished, names_of, read_setting
from quadriga.cli.main import main
from quadriga.errors import UserError

MODE, SEED, STEPS = "activation_checkpoint.mode", "debug.seed", "training.steps"


def compared(folders, varied=None, accepted=(), analyse=no_traces, warmup=5):
    names = names_of(folders, None)
    settings = [read_setting(name, folder, warmup) for name, folder in zip(names, folders, strict=True)]
    return compare_settings(settings, varied=varied, accepted=accepted, analyse=analyse, warmup=warmup)


def two_runs(tmp_path, **other):
    return [make_run(tmp_path / "a"), make_run(tmp_path / "b", begins=100.0, **other)]


def refusal(*args, **keys):
    with pytest.raises(UserError) as refused:
        compared(*args, **keys)
    return str(refused.value)


def test_runs_that_differ_in_one_key_are_compared_by_it(tmp_path):
    found = compared(two_runs(tmp_path, keys={MODE: "full"}))
    assert found["varied"] == {MODE: ["selective", "full"]}
    assert [run["values"] for run in found["runs"]] == [{MODE: "selective"}, {MODE: "full"}]


def test_where_they_write_and_what_they_print_is_no_difference(tmp_path):
    keys = {"job.description": "other", "job.print_config": True}
    assert compared(two_runs(tmp_path, keys=keys))["varied"] == {}


def test_runs_that_differ_in_more_are_refused_with_all_of_it(tmp_path):
    folders = two_runs(tmp_path, keys={MODE: "full", SEED: 7})
    report = refusal(folders)
    assert "2 problems" in report
    assert "debug.seed\n    the runs differ in more than was varied (a: 42; b: 7)" in report
    assert "--accept-difference debug.seed" in report
    assert refusal(folders, varied=[MODE]).count("1 problem") == 1
    assert refusal(folders, accepted=[MODE]).count("1 problem") == 1


def test_a_difference_that_is_accepted_counts_as_varied(tmp_path):
    found = compared(two_runs(tmp_path, keys={MODE: "full", SEED: 7}), accepted=[MODE, SEED])
    assert list(found["varied"]) == [MODE, SEED]
    assert "not comparable: the settings read different batches (debug.seed)" in found["losses"]["note"]


def test_an_accepted_key_must_differ(tmp_path):
    assert "the runs do not differ in this" in refusal(two_runs(tmp_path, keys={MODE: "full"}), accepted=[SEED])


def test_what_a_bench_varied_alone_may_differ(tmp_path):
    assert "training.steps" in refusal(two_runs(tmp_path, keys={STEPS: 30}), varied=[MODE])


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"git": {"commit": "def", "changed": False}}, "environment.git.commit"),
        ({"libraries": {"torch": "2.11.0", "numpy": "2.1"}}, "environment.libraries.torch"),
        ({"world_size": 4}, "environment.world_size"),
        ({"devices": ["H100"]}, "environment.devices"),
    ],
)
def test_a_machine_or_version_that_decides_is_a_difference(other, key, tmp_path):
    folders = two_runs(tmp_path, environment=other, keys={MODE: "full"})
    assert key in refusal(folders, varied=[MODE])
    assert list(compared(folders, accepted=[MODE, key])["varied"]) == [MODE, key]


def test_other_differences_of_the_machines_are_warnings(tmp_path):
    found = compared(two_runs(tmp_path, environment={"host": "two", "python": "3.11.9"}))
    assert "the runs differ in environment.host: one, two" in found["warnings"]
    assert "the runs differ in environment.python: 3.11.7, 3.11.9" in found["warnings"]


def test_a_changed_tree_is_a_warning(tmp_path):
    changed = {"git": {"commit": "abc", "changed": True}}
    found = compared(two_runs(tmp_path, environment=changed, keys={MODE: "full"}))
    assert any("the code was changed" in warning for warning in found["warnings"])


def test_a_varied_backend_may_change_what_follows_from_it(tmp_path):
    other = {"backend": "nccl", "backends": {"shard": "nccl"}, "environment": {"OMP_NUM_THREADS": "1"}}
    found = compared(two_runs(tmp_path, keys={"comm.backend": "nccl"}, environment=other))
    assert found["varied"] == {"comm.backend": ["gloo", "nccl"]}


def test_repeats_that_differ_are_refused(tmp_path):
    make_setting(tmp_path / "a", [0.1, 0.1])
    make_run(tmp_path / "a" / "repeat-3", keys={SEED: 3})
    make_setting(tmp_path / "b", [0.1] * 3)
    report = refusal([tmp_path / "a", tmp_path / "b"])
    assert "its repeats differ in debug.seed: 42 in repeat-1, 3 in repeat-3" in report


def test_repeats_may_differ_in_what_is_accepted(tmp_path):
    """A bench that went on after the code was changed, and the change is known not to matter."""
    make_pair(tmp_path, [0.1] * 2, [0.1] * 2, keys={MODE: "full"})
    for number, setting in enumerate("ab"):
        later = {"git": {"commit": "def", "changed": False}}
        keys = {MODE: "full"} if setting == "b" else None
        make_run(tmp_path / setting / "repeat-3", begins=900.0 + 100.0 * number, environment=later, keys=keys)
    folders, commit = [tmp_path / "a", tmp_path / "b"], "environment.git.commit"
    assert f"its repeats differ in {commit}" in refusal(folders, varied=[MODE])
    assert list(compared(folders, varied=[MODE], accepted=[commit])["varied"]) == [MODE]


def test_what_is_no_run_is_refused(tmp_path):
    make_run(tmp_path / "a")
    for name, says in (("none", "there is no such folder"), ("empty", "the folder has no run")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert says in refusal([tmp_path / "a", tmp_path / name])


def test_a_damaged_record_is_left_out_and_named_by_its_line(tmp_path):
    folders = two_runs(tmp_path)
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    (warning,) = compared(folders)["runs"][1]["warnings"]
    assert "metrics.jsonl: 1 line is no record of a run and left out (line 21: not JSON" in warning


def test_runs_without_a_window_after_the_warm_up_are_refused(tmp_path):
    assert "no window of steps is left" in refusal(two_runs(tmp_path), warmup=20)


def test_runs_that_ended_early_or_lack_their_environment_are_reported(tmp_path):
    folders = two_runs(tmp_path, steps=15)
    (folders[1] / "environment.json").unlink()
    warnings = compared(folders)["runs"][1]["warnings"]
    assert "ended after step 15 of 20" in warnings
    assert any("no environment.json" in each for each in warnings)


def test_repeats_that_have_not_finished_are_left_out_and_reported(tmp_path):
    folders = make_pair(tmp_path, [0.1] * 3, [0.1] * 3)
    (folders[1] / "repeat-3" / "events.jsonl").unlink()
    found = compared(folders)
    assert [run["repeats"] for run in found["runs"]] == [3, 2]
    assert found["runs"][1]["warnings"] == ["repeat-3 has not finished, and is excluded"]
    assert found["figures"][0]["ratios"][0]["pairs"] == 2


def test_rounds_are_those_that_all_settings_have(tmp_path):
    make_setting(tmp_path / "a", [0.1] * 4, apart=200.0)
    make_setting(tmp_path / "b", [0.1] * 3, first=100.0, apart=200.0)
    ratio = compared([tmp_path / "a", tmp_path / "b"])["figures"][0]["ratios"][0]
    assert ratio["pairs"] == 3


def test_runs_that_were_not_interleaved_are_reported(tmp_path):
    make_setting(tmp_path / "a", [0.1] * 3, apart=100.0)
    make_setting(tmp_path / "b", [0.1] * 3, first=300.0, apart=100.0)
    assert any("were not interleaved" in warning for warning in compared([tmp_path / "a", tmp_path / "b"])["warnings"])


def test_runs_at_the_same_time_are_reported(tmp_path):
    make_setting(tmp_path / "a", [0.1] * 3)
    make_setting(tmp_path / "b", [0.1] * 3, first=1.0)
    assert any("overlapped in time" in warning for warning in compared([tmp_path / "a", tmp_path / "b"])["warnings"])


def test_a_setting_that_was_always_first_is_reported(tmp_path):
    make_setting(tmp_path / "a", [0.1] * 3, apart=200.0)
    make_setting(tmp_path / "b", [0.1] * 3, first=100.0, apart=200.0)
    assert any("always first" in warning for warning in compared([tmp_path / "a", tmp_path / "b"])["warnings"])
    (tmp_path / "turns").mkdir()
    assert compared(make_pair(tmp_path / "turns", [0.1] * 3, [0.1] * 3))["warnings"] == []


def test_the_folder_of_a_bench_stands_for_its_settings(tmp_path):
    make_pair(tmp_path, [0.1], [0.1])
    settings = [{"folder": "a", "name": "mode=none"}, {"folder": "b", "name": "mode=full"}]
    (tmp_path / "bench.json").write_text(json.dumps({"settings": settings, "varied": {MODE: ["none", "full"]}}))
    folders = folders_of([tmp_path])
    assert folders == [tmp_path / "a", tmp_path / "b"]
    assert names_of(folders, find_bench(folders)) == ["mode=none", "mode=full"]
    assert find_bench([tmp_path / "a", tmp_path]) is None


@pytest.mark.parametrize("name", ["..", "a/b", "", "\0", "\ud800", "a" * 256])
def test_a_bench_s_setting_is_a_folder_that_can_be_there(tmp_path, name):
    settings = [{"folder": "a", "name": "mode=none"}, {"folder": name, "name": "mode=full"}]
    (tmp_path / "bench.json").write_text(json.dumps({"settings": settings, "varied": {MODE: ["none", "full"]}}))
    with pytest.raises(UserError, match="not the record of a bench"):
        folders_of([tmp_path])


def test_a_switch_of_the_profiler_that_is_no_switch_is_taken_for_off():
    assert cycle_of({"enable_profiling": 1}, 10) is None


def test_names_distinguish_runs(tmp_path):
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    assert names_of(folders, None) == ["one/run", "two/run"]
    with pytest.raises(UserError, match="named twice"):
        names_of([tmp_path, tmp_path], None)


def test_comparing_loads_no_torch(root):
    code = "import sys, quadriga.cli.bench, quadriga.cli.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_has_finished(tmp_path):
    folder = make_run(tmp_path / "a")
    assert has_finished(folder)
    again = {"event": "start", "time": 2e9, "attempt": 2, "rank": 0, "step": 0}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert not has_finished(folder)
    assert not has_finished(tmp_path)


def changed(folder, change):
    lines = [change(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def printed(tmp_path, capsys, *options):
    page = tmp_path / "page.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page), *options]) == 0
    assert page.stat().st_size > 0
    return capsys.readouterr().out


def test_a_headline_that_no_run_has_is_no_answer(tmp_path, capsys):
    for folder in two_runs(tmp_path, tokens=300):
        changed(folder, lambda line: {name: value for name, value in line.items() if name != "tokens_per_second"})
    answer = "no answer: tokens_per_second cannot be compared: a run has no finite value of it"
    assert printed(tmp_path, capsys).startswith(answer)


def test_steps_without_a_duration_are_no_answer(tmp_path, capsys):
    two_runs(tmp_path)
    changed(tmp_path / "a", lambda line: {**line, "step_seconds": 0.0})
    answer = "no answer: step_time_s cannot be compared: its median is not above 0 in every run"
    assert printed(tmp_path, capsys).startswith(answer)


def test_losses_that_are_not_finite_were_logged(tmp_path, capsys):
    two_runs(tmp_path)
    changed(tmp_path / "a", lambda line: {**line, "loss": float("nan")})
    assert "losses: no step has a finite loss in all runs" in printed(tmp_path, capsys)


def test_figures_at_the_end_of_float64_are_printed_and_are_json(tmp_path, capsys):
    two_runs(tmp_path)
    changed(tmp_path / "a", lambda line: {**line, "loss": 1.7e308, "tflops": 1.7e308})
    changed(tmp_path / "b", lambda line: {**line, "loss": -1.7e308, "tflops": 1e-308})
    assert max(map(len, printed(tmp_path, capsys).splitlines())) < 300
    json.loads(printed(tmp_path, capsys, "--json"))


def test_lines_of_two_runs_are_told(tmp_path, capsys):
    two_runs(tmp_path)
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_text(file.read_text() * 2)
    assert "these may be lines of two runs" in printed(tmp_path, capsys)
