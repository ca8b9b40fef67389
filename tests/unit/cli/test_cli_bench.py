"""`quadriga bench` before, between and after its runs; what a run is, is played by a few lines that leave its folder.

tests/distributed/test_bench.py has the real launches.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import make_run, no_traces

from quadriga.analysis.compare.plan import parse_choices, run_order
from quadriga.cli import bench, compare
from quadriga.cli.main import main
from quadriga.errors import UserError
from quadriga.launch.supervisor import check_before_launch

TOML = """
[job]
dump_folder = "out/small"
[training]
steps = 30
seq_len = 64
local_batch_size = 2
[parallelism]
data_parallel_shard_degree = -1
"""
MODE = "activation_checkpoint.mode"
VARY = ["--vary", f"{MODE}=none,full", "--ngpu", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("NNODES", "NGPU", "COMM_BACKEND", "CONFIG_FILE", "DRY_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "small.toml").write_text(TOML)
    return tmp_path


class FakeRunner:
    """Runs in the place of launches: `seconds` of a step by the varied mode; `fails` names a run that ends badly."""

    def __init__(self):
        self.argvs, self.ran, self.environs = [], [], []
        self.fails, self.ended_by = None, None

    def __call__(self, argv, environ, log):
        _, run = check_before_launch(argv, environ)
        comm = run.config.comm.model_copy(update={"backend": "gloo"})
        config = run.config.model_copy(update={"comm": comm})
        folder = Path(config.job.dump_folder)
        name = str(folder.relative_to(folder.parents[1]))
        self.argvs.append(argv)
        self.environs.append(environ)
        self.ran.append(name)
        if name == self.fails:
            folder.mkdir()
            log.write_text("step 1\nrank 0 failed first:\n\nout of memory\n")
            return 6, self.ended_by
        seconds = 0.2 if config.activation_checkpoint.mode == "full" else 0.1
        make_run(folder, seconds + 0.001 * len(self.ran), begins=1000.0 * len(self.ran), config=config)
        return 0, None


@pytest.fixture
def fake_runner(monkeypatch) -> FakeRunner:
    runs = FakeRunner()
    monkeypatch.setattr(bench, "run_launch", runs)
    monkeypatch.setattr(compare, "load_analyse", lambda: no_traces)
    return runs


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--vary", "training.sequence=1,2"], "did you mean: training.seq_len"),
        (["--vary", f"{MODE}=none,ful"], "did you mean: full"),
        (["--vary", "comm.backend=gloo,nccl"], "none is visible here"),
        (["--vary", "comm.backend=gloo,ncll"], "did you mean: nccl"),
        (["--vary", "training.local_batch_size=2,3", "--training.global_batch_size", "4"], "must be a multiple of"),
        (["--vary", f"{MODE}=none"], "at least two values are needed"),
        (["--vary", f"{MODE}=none,none"], "at least two values are needed, each once"),
        (["--vary", "mode=none,full"], "not of the form that is needed"),
        (["--vary", f"{MODE}=none,full", "--vary", f"{MODE}=none,selective"], "is varied twice"),
        (["--vary", f"{MODE}=none,full", f"--{MODE}", "none"], "is varied and given for all runs too"),
        (["--vary", "debug.seed=1,2"], "all runs have the same seed"),
        (["--vary", "job.dump_folder=a,b"], "each run has a folder of its own"),
        (["--vary", f"{MODE}=none,full", "--job.dump_folder", "x"], "each run has a folder of its own"),
        (["--vary", f"{MODE}=none,full", "--steps", "30", "--training.steps", "30"], "training.steps is given too"),
        (["--vary", f"{MODE}=none,full", "--steps", "6"], "leaves 1 windows to time"),
        (["--vary", f"{MODE}=none,full", "--repeat", "0"], "0 is not a number"),
        (["--vary", f"{MODE}=none,full", "--html", "none/page.html"], "not a file in a folder that is there"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(more, says, fake_runner, folder, capsys):
    assert main(["bench", "small.toml", "--ngpu", "1", *more]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert fake_runner.ran == []
    assert [path.name for path in folder.iterdir()] == ["small.toml"]


def test_several_machines_are_refused(fake_runner, monkeypatch, capsys):
    monkeypatch.setenv("NNODES", "2")
    assert main(["bench", "small.toml", *VARY]) == 2
    assert "one machine" in capsys.readouterr().err
    assert fake_runner.ran == []


def test_the_runs_are_interleaved_and_compared(fake_runner, folder, capsys):
    assert main(["bench", "small.toml", *VARY, "--repeat", "3", "--optimizer.lr", "1e-3"]) == 0
    printed = capsys.readouterr()
    order = ["1/1", "2/1", "2/2", "1/2", "1/3", "2/3"]
    assert fake_runner.ran == [f"setting-{each[0]}/repeat-{each[2]}" for each in order]
    assert "mode=full is 4" in printed.out.splitlines()[0]
    assert "% slower than mode=none" in printed.out.splitlines()[0]
    assert "run 6 of 6: round 3, mode=full" in printed.err
    for argv, environ in zip(fake_runner.argvs, fake_runner.environs, strict=True):
        assert "1e-3" in argv
        assert "--checkpoint.enable=false" in argv
        assert "--profiling.profile_freq=30" in argv
        assert environ["NGPU"] == "1"
    note = json.loads((folder / "out/small-bench/bench.json").read_text())
    assert note["varied"] == {MODE: ["none", "full"]}
    assert [setting["name"] for setting in note["settings"]] == ["mode=none", "mode=full"]


def test_what_the_user_says_is_not_set_by_the_bench(fake_runner):
    keys = ["--profiling.no_enable_profiling", "--metrics.log_freq", "3", "--checkpoint.enable=true"]
    assert main(["bench", "small.toml", *VARY, "--repeat", "1", *keys]) == 0
    config = check_before_launch(fake_runner.argvs[0], fake_runner.environs[0])[1].config
    assert (config.profiling.enable_profiling, config.metrics.log_freq, config.checkpoint.enable) == (False, 3, True)


def test_finished_runs_are_kept_and_more_repeats_are_added(fake_runner, capsys):
    assert main(["bench", "small.toml", *VARY, "--repeat", "1"]) == 0
    capsys.readouterr()
    assert main(["bench", "small.toml", *VARY, "--repeat", "2"]) == 0
    assert fake_runner.ran[2:] == ["setting-2/repeat-2", "setting-1/repeat-2"]
    assert "run 1 of 4: round 1, mode=none: finished before" in capsys.readouterr().err


def test_a_failed_run_stops_the_bench_and_the_same_command_goes_on(fake_runner, folder, capsys):
    fake_runner.fails = "setting-2/repeat-1"
    command = ["bench", "small.toml", *VARY, "--repeat", "2", "--out", "bench"]
    assert main(command) == 6
    output = capsys.readouterr().err
    assert "mode=full: failed with exit code 6" in output
    assert "rank 0 failed first:\n\nout of memory" in output
    assert "give the same command again: finished runs are kept" in output
    fake_runner.fails = None
    assert main(command) == 0
    assert fake_runner.ran == [
        "setting-1/repeat-1",
        *["setting-2/repeat-1"] * 2,
        "setting-2/repeat-2",
        "setting-1/repeat-2",
    ]
    assert (folder / "bench/setting-2/repeat-1-unfinished-1").is_dir()


def test_a_signal_ends_the_bench_with_its_code(fake_runner, capsys):
    fake_runner.fails, fake_runner.ended_by = "setting-1/repeat-1", 15
    assert main(["bench", "small.toml", *VARY]) == 128 + 15
    assert "ended by SIGTERM; the same command goes on from here" in capsys.readouterr().err


def test_finished_runs_of_another_configuration_are_refused(fake_runner, capsys):
    assert main(["bench", "small.toml", *VARY, "--repeat", "1", "--out", "bench"]) == 0
    for more, says in (
        (["--steps", "40"], "a finished run of another configuration: metrics.log_freq was 1, is now 2"),
        (["--optimizer.lr", "1e-3"], "optimizer.lr was 0.0008, is now 0.001"),
    ):
        assert main(["bench", "small.toml", *VARY, "--out", "bench", *more]) == 2
        assert says in capsys.readouterr().err
    others = ["--vary", f"{MODE}=none,selective", "--ngpu", "1", "--out", "bench"]
    assert main(["bench", "small.toml", *others]) == 2
    assert "the folder holds a bench with other settings" in capsys.readouterr().err
    assert len(fake_runner.ran) == 2


def test_a_folder_with_something_else_in_it_is_left_alone(fake_runner, folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "file").write_text("x")
    assert main(["bench", "small.toml", *VARY, "--out", "mine"]) == 2
    assert "holds no bench" in capsys.readouterr().err
    assert fake_runner.ran == []


def test_compare_reads_the_folder_of_a_bench(fake_runner, capsys):
    assert main(["bench", "small.toml", *VARY, "--repeat", "3", "--out", "bench"]) == 0
    capsys.readouterr()
    assert main(["compare", "bench", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["compare", "bench/setting-1", "bench/setting-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert whole["varied"] == {MODE: ["none", "full"]}
    assert main(["compare", "bench", "--html", "page.html"]) == 0
    assert "<svg" in Path("page.html").read_text()
    assert capsys.readouterr().out.startswith("mode=full is ")
    assert main(["compare", "bench/setting-1"]) == 2
    assert "two runs are needed" in capsys.readouterr().err
    assert main(["compare", "bench", "--warmup", "40"]) == 2
    assert "no window of steps is left" in capsys.readouterr().err


def test_every_combination_is_a_setting_and_lists_keep_their_commas():
    found = parse_choices(["a.x=1,2", "b.y=[p,q],[p]"])
    assert [dict(choice.values) for choice in found] == [
        {"a.x": "1", "b.y": "[p,q]"},
        {"a.x": "1", "b.y": "[p]"},
        {"a.x": "2", "b.y": "[p,q]"},
        {"a.x": "2", "b.y": "[p]"},
    ]
    assert found[3].name == "x=2, y=[p]"
    assert parse_choices(["a.x=1,2", "b.x=3,4"])[0].name == "a.x=1, b.x=3"
    with pytest.raises(UserError):
        parse_choices(["a.x=1,,2"])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_setting_is_first_equally_often(count):
    rounds = list(run_order(count, 2 * count))
    assert [number for number, _ in rounds] == list(range(1, 2 * count + 1))
    assert all(sorted(order) == list(range(count)) for _, order in rounds)
    assert [order[0] for _, order in rounds] == [*range(count)] * 2
