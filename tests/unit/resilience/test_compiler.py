"""Where compiled code is kept, and what a failed compilation says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from launching import RUN_TRAIN, launch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from training import TINY

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.schema import Compile
from quadriga.errors import UserError
from quadriga.models.registry import catalogue
from quadriga.parallel.parallelize import apply_compile
from quadriga.resilience.compiler import CACHE, set_compile_cache
from quadriga.resilience.failures import record_failure
from quadriga.resilience.progress import Progress


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        set_compile_cache(environ)
    assert CACHE not in environ
    assert f"set {CACHE} to a folder that only you can write" in caught.value.report
    return caught.value.report


def test_the_cache_is_a_folder_of_the_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):  # the second start finds it
            environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
            set_compile_cache(environ)
    finally:
        os.umask(before)
    folder = Path(environ[CACHE])
    assert folder == tmp_path / "cache" / "quadriga-compile"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_a_variable_it_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    by_torch = {CACHE: default_cache_dir()}  # as an import of torch sets it
    for environ in ({}, by_torch, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "not/absolute"}):
        set_compile_cache(environ)
        assert environ[CACHE] == str(tmp_path / ".cache/quadriga-compile")


def test_a_folder_that_the_user_names_is_kept(tmp_path: Path) -> None:
    environ = {CACHE: str(tmp_path / "mine"), "XDG_CACHE_HOME": "/proc/none"}
    set_compile_cache(environ)
    assert environ[CACHE] == str(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ, folder = {"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "quadriga-compile"
    folder.symlink_to(tmp_path)
    assert "no folder of this user" in refusal(environ)
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o770)
    assert "other users have access" in refusal(environ)
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert "no folder of this user" in refusal(environ)
    assert "cannot be created" in refusal({"XDG_CACHE_HOME": "/proc/none"})
    set_compile_cache(environ)
    assert environ[CACHE] == str(folder)


def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    raise RuntimeError("no C++ compiler was found\n\nand much more")


class Doubles(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * hidden


class Breaks(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        print("a graph break")
        return hidden


@pytest.mark.parametrize(
    ("block", "backend", "reason"),
    [(Doubles(), failing, "no C++ compiler was found"), (Breaks(), "eager", "Unsupported: ")],
    ids=["backend", "graph break"],
)
def test_a_failed_compilation_names_the_key(block: nn.Module, backend: object, reason: str) -> None:
    argv = ["--model.hf_assets_path=builtin:bytes", "--compile.enable"]
    run = read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=False)
    model = nn.Sequential(block)
    apply_compile(model, ("0",), Compile.model_construct(enable=True, backend=backend))
    with pytest.raises(UserError) as caught, record_failure(run, Progress()):
        model(torch.ones(2))
    report = caught.value.report
    assert "compile.enable = true  [command line]" in report
    assert reason in report
    assert "much more" not in report
    assert "set compile.enable = false" in report


def test_a_run_whose_compiler_fails_ends_with_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE, raising=False)  # of tests in this process that compiled
    keys = (*TINY, "--training.steps=2", f"--job.dump_folder={tmp_path / 'run'}", "--checkpoint.enable=false")
    environ = {"NGPU": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": "/bin/false"}
    ended = launch([*RUN_TRAIN, *keys, "--compile.enable"], environ)
    assert ended.code == 2, ended.err
    assert "compile.enable = true  [command line]" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "cache/quadriga-compile").is_dir()
