"""DRY_RUN: every shipped file, what it says, and that it is quick."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, launch

from quadriga.launch.supervisor import main

SHIPPED = sorted(path.parent.name for path in ROOT.glob("configs/*/*.toml"))


def shipped(name: str) -> str:
    return str(ROOT / "configs" / name / f"{name}.toml")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([], {"CONFIG_FILE": shipped(name), "NGPU": "8", "DRY_RUN": "1"})
    assert code == (0 if name == "debug" else 2)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "on 8 ranks" in shown.out
    assert "FSDP over 8" in shown.out
    assert "ports        the store on 127.0.0.1; " in shown.out
    if name == "debug":
        assert shown.out.endswith("Ready to train.\n")
    else:  # the tokenizer has to be downloaded first, and the dry run says how
        assert "Before it can train:" in shown.out
        assert "scripts/download_hf_assets.py" in shown.out
        assert shown.out.count("no tokenizer is there") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_reference_in_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], {"CONFIG_FILE": shipped("llama3_8b"), "DRY_RUN": "1"}) == 2  # its tokenizer is to be downloaded
    shown = capsys.readouterr().out
    assert "8,030,261,248 parameters" in shown
    assert "4 data-parallel ranks x 2 sequences = 8 sequences of 512 tokens = 4,096 tokens per step" in shown
    assert "parameters 7.48 GiB + gradients 7.48 GiB + Adam's moments 14.96 GiB = 29.92 GiB per rank" in shown
    assert "96.4 GB" in shown


def test_a_device_that_is_faster_in_bfloat16_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name, device, said in (
        ("llama3_8b", "h100-80gb", 1),
        ("llama3_8b", "t4-16gb", 0),
        ("llama3_8b_bf16", "h100-80gb", 0),
    ):
        main(["--estimate.device", device], {"CONFIG_FILE": shipped(name), "DRY_RUN": "1"})
        assert capsys.readouterr().out.count("and in bfloat16 at 989.4 (15 times)") == said


def test_it_is_quick_and_needs_no_device() -> None:
    """The processor time of the whole command stays under a second; so does the wall clock where nothing else runs.

    On a slow or a loaded machine it stays under six times what an import of pydantic takes, which is a part of it."""
    environ = {"CONFIG_FILE": shipped("llama3_8b"), "DRY_RUN": "1", "COMM_BACKEND": "nccl"}

    def dry_run() -> None:
        ended = launch(RUN_TRAIN, environ)
        assert ended.code == 2, ended.err  # the tokenizer is to be downloaded

    def load_pydantic() -> None:
        subprocess.run([sys.executable, "-c", "from pydantic import BaseModel"], check=True)

    assert processor_seconds(dry_run) < max(1.0, 6 * processor_seconds(load_pydantic))


def processor_seconds(command: Callable[[], None]) -> float:
    """Of the processes that `command` starts; the best of three, because cores that are shared are slower."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append((after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime))
    return min(times)


def test_help_lists_variables_keys_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == 0
    shown = capsys.readouterr().out
    for part in ("NGPU", "RDZV_ENDPOINT", "Exit codes", "--training.steps", "--parallelism.tensor_parallel_degree"):
        assert part in shown
