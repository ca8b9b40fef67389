"""The part of the Python API without torch: imports, configurations, errors, estimates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from launching import ROOT
from training import DEBUG_FILE, TINY

import quadriga

LIGHT = "import sys, json, quadriga; print(json.dumps(sorted(sys.modules)))"
HELP = "import sys, json; from quadriga.cli.main import main; main(['--help']); print(json.dumps(sorted(sys.modules)))"
HELP_MODULES = {f"quadriga.{name}" for name in ("cli", "cli.main", "errors", "log", "terminal")}
PLANNING = """
import sys, quadriga
config = quadriga.load_config(sys.argv[1], {"training.steps": 7})
assert quadriga.resolve(config).spec.steps == config.values.training.steps == 7
print(quadriga.estimate(quadriga.resolve(config, ranks=8), "h100-80gb").memory_fit().label, "torch" in sys.modules)
"""


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("code", [LIGHT, HELP], ids=["import", "help"])
def test_what_an_import_loads(code):
    """Neither torch nor pydantic, and of Quadriga what errors and the list of commands need."""
    modules = json.loads(run_python(code).splitlines()[-1])
    assert not {name.split(".")[0] for name in modules} & {"torch", "numpy", "pydantic", "typing_extensions"}
    own = {name for name in modules if name.startswith("quadriga.")}
    assert own == (set() if code is LIGHT else HELP_MODULES)


def test_planning_needs_no_torch():
    assert run_python(PLANNING, DEBUG_FILE).split() == ["fits", "False"]


def test_every_name_is_there_and_no_other():
    assert set(quadriga.__all__) <= set(dir(quadriga))
    for name in quadriga.__all__:
        found = getattr(quadriga, name)
        assert name == "__version__" or (found.__doc__ and found.__module__.startswith("quadriga."))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        quadriga.trian  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "quadriga/py.typed").read_text() == ""
    assert '"quadriga" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.more
def test_a_type_checker_sees_the_types(tmp_path):
    """In the example and after it; a wrong name or type is an error."""
    good = (ROOT / "examples/notebook.py").read_text()
    file, bad = tmp_path / "good.py", tmp_path / "bad.py"
    file.write_text(good + "path: str = trainer.save()\nloss: float = trainer.evaluate()\n")
    bad.write_text(good + "quadriga.lode_config\nquadriga.estimate(3)\nsteps: str = run.config.training.steps\n")
    cache = tmp_path / "cache"
    if (ROOT / ".mypy_cache").is_dir():  # of `make lint`; torch and the package are not analysed again
        shutil.copytree(ROOT / ".mypy_cache", cache)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", str(cache)]
    done = subprocess.run([*command, str(file), str(bad)], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 3, done.stdout
    assert all("bad.py" in line for line in errors)


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        ({"training.steps": 20}, ["--training.steps", "20"]),
        ({"optimizer.lr": 1e-5, "debug.deterministic": True}, ["--optimizer.lr=1e-5", "--debug.deterministic"]),
        ({"training.dataset_path": None}, ["--training.dataset_path", "none"]),
        ({"job.description": 'a "b", c'}, ["--job.description", 'a "b", c']),
        ({"job.dump_folder": ROOT / "x"}, ["--job.dump_folder", str(ROOT / "x")]),
        ({"compile.components": ("loss",)}, ["--compile.components", "loss"]),
        ({"checkpoint.exclude_from_loading": ["optimizer"]}, ["--checkpoint.exclude_from_loading", "optimizer"]),
    ],
)
def test_overrides_are_those_of_the_command_line(overrides, arguments):
    assert quadriga.load_config(DEBUG_FILE, overrides).values == quadriga.load_config(DEBUG_FILE, arguments).values
    default = quadriga.load_config(DEBUG_FILE, ["--job.dump_folder=x"]).values
    assert default != quadriga.load_config(DEBUG_FILE, overrides).values


def test_errors_are_those_of_the_command_line():
    wrong = {"training.step": 3, "training.seq_len": "2k"}
    with pytest.raises(quadriga.UserError) as keys:
        quadriga.load_config(DEBUG_FILE, wrong)
    with pytest.raises(quadriga.UserError) as rules:
        quadriga.resolve(quadriga.load_config(DEBUG_FILE, {"parallelism.tensor_parallel_degree": 3}), ranks=4)
    for error, arguments in (
        (keys, ["--training.step=3", "--training.seq_len=2k"]),
        (rules, ["--parallelism.tensor_parallel_degree=3", "--ngpu=4"]),
    ):
        command = [sys.executable, "-m", "quadriga.cli", "estimate", DEBUG_FILE, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stderr.strip() == error.value.report.strip()


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [("WORLD_SIZE", "none", "WORLD_SIZE"), ("LOG_RANK", "all", "LOG_RANK"), ("RANK", "3", "RANK")],
)
def test_variables_are_checked(monkeypatch, variable, value, place):
    monkeypatch.setenv(variable, value)
    with pytest.raises(quadriga.UserError) as error:
        quadriga.resolve(quadriga.load_config(DEBUG_FILE))
    assert [problem.where for problem in error.value.problems] == [place]


def test_a_configuration_that_only_rehearses_is_refused():
    with pytest.raises(quadriga.UserError, match=r"comm\.mode"):
        quadriga.resolve(quadriga.load_config(DEBUG_FILE, {"comm.mode": "fake_backend"}))


def test_the_estimate_is_that_of_the_command_line():
    run = quadriga.resolve(quadriga.load_config(DEBUG_FILE, TINY), ranks=8)
    command = [sys.executable, "-m", "quadriga.cli", "estimate", DEBUG_FILE, "--ngpu=8", *TINY, "--json"]
    done = subprocess.run([*command, "--device=a100-80gb"], cwd=ROOT, capture_output=True, text=True, check=True)
    theirs, ours = json.loads(done.stdout), quadriga.estimate(run, "a100-80gb").to_dict()
    assert {**ours, "advice": None} == {**theirs, "advice": None}
    assert ours["step_time_s"] > 0
    assert quadriga.estimate(run).time is None
    with pytest.raises(quadriga.UserError, match="a100-80gb"):
        quadriga.estimate(run, "abacus")
