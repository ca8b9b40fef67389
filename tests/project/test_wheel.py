"""A wheel of the committed files, installed into an environment of its own, works outside of the checkout.

Nothing is downloaded: the environment sees the libraries of the tests' one, except Quadriga.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import LAUNCH_VARIABLES
from training import TINY

from quadriga import __version__
from quadriga.config.card import read_target

pytestmark = pytest.mark.more

ROOT = Path(__file__).resolve().parents[2]
PROFILED = (
    *(argument for argument in TINY if argument != "--profiling.no_enable_profiling"),
    *("--training.steps=2", "--profiling.profile_freq=2", "--profiling.profiler_warmup=1"),
    "--profiling.profiler_active=1",
)


def run(*command: str | Path, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
    """The standard output of a command that must end well. It does not see the checkout."""
    hidden = (*LAUNCH_VARIABLES, "PYTHONPATH", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    clean |= {"CUDA_VISIBLE_DEVICES": "", **(environ or {})}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows, and of no others."""
    folder = tmp_path_factory.mktemp("tracked")
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tracked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, tracked, cwd=out)
    return next(out.glob("quadriga-*.whl"))


@dataclass(frozen=True)
class Installed:
    bin: Path
    folder: Path  # the current directory of commands

    def quadriga(self, *arguments: str | Path) -> str:
        return run(self.bin / "quadriga", *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    python = folder / "env/bin/python"
    options = ("--no-deps", "--no-index", "--constraint", ROOT / "requirements.txt")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    # A path in a .pth file does not read the .pth files there, so an editable installation of Quadriga stays unseen.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return Installed(folder / "env/bin", tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def trained(installed: Installed) -> Path:
    """The run folder of two steps, the second of which is profiled."""
    installed.quadriga("configs", "--copy", "configs", "debug")
    keys = (*PROFILED, "--job.dump_folder=out", "--checkpoint.no_enable")
    environ = {"CONFIG_FILE": "./configs/debug/debug.toml", "NGPU": "1", "OMP_NUM_THREADS": "1"}
    run(installed.bin / "python", "-m", "quadriga.launch", *keys, cwd=installed.folder, environ=environ)
    return installed.folder / "out"


def test_the_wheel_has_every_file_of_the_package(tracked: Path, wheel: Path) -> None:
    """Templates and styles too: a file that git knows and the wheel lacks fails, and so does one that git lacks."""
    package = {str(path.relative_to(tracked)) for path in (tracked / "quadriga").rglob("*") if path.is_file()}
    configs = {f"quadriga/{path.relative_to(tracked)}" for path in (tracked / "configs").glob("*/*")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package | configs
    assert {name.rpartition(".dist-info/")[2] for name in names - package - configs} >= {"entry_points.txt", "METADATA"}


def test_the_command_is_that_of_the_wheel(installed: Installed) -> None:
    assert "usage: quadriga COMMAND" in installed.quadriga("--help")
    assert installed.quadriga("--version").strip() == __version__
    file = run(installed.bin / "python", "-c", "import quadriga; print(quadriga.__file__)", cwd=installed.folder)
    assert Path(file.strip()).is_relative_to(installed.bin.parent)


def test_shipped_configurations_are_found_and_extended(installed: Installed, tmp_path: Path) -> None:
    path = installed.quadriga("configs", "debug").strip()
    assert Path(path).is_relative_to(installed.bin.parent)
    assert "Ready to train." in installed.quadriga("dry-run", path, "--ngpu", "2")
    (tmp_path / "mine.toml").write_text(f'extends = "{path}"\n[training]\nsteps = 7\n', encoding="utf-8")
    assert "7 steps" in installed.quadriga("dry-run", tmp_path / "mine.toml", "--ngpu", "2")


def test_templates_are_read(installed: Installed, tmp_path: Path) -> None:
    """Those of cards, of the page of keys, and of CCL-Bench; the next test reads those of pages."""
    card = installed.quadriga("card", installed.quadriga("configs", "debug").strip(), "--print")
    assert read_target(card) is not None
    code = "from quadriga.config.reference import reference_page; print(reference_page())"
    assert "loss_chunks" in run(installed.bin / "python", "-c", code, cwd=tmp_path)


def test_a_run_is_trained_and_shown_as_a_page(installed: Installed, trained: Path, tmp_path: Path) -> None:
    assert (trained / "metrics.jsonl").read_text().count('"kind": "train"') == 2
    installed.quadriga("trace", trained, "--html", tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "<style>" in page
    assert "<svg" in page
