"""`compile.enable = "auto"`: decided by the configuration and the kind of device, kept on resume, and shown."""

from __future__ import annotations

import json

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import messages, read
from quadriga.launch.supervisor import main
from quadriga.models.registry import catalogue
from quadriga.planning.estimate import estimate

AUTO = "--compile.enable=auto"
BUDGET = "--activation_checkpoint.mode=memory_budget"
ZBV = (
    *("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"),
    "--training.local_batch_size=4",
)
EMULATED = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")
ASYNC = ("--parallelism.tensor_parallel_degree=2", "--parallelism.enable_async_tensor_parallel")


def run_of(*arguments, saved=None, environ=None, ranks=2, training=False):
    argv = ["--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", *arguments]
    return read(
        argv,
        environ or {},
        catalogue=catalogue(),
        backends=BACKENDS,
        world_size=ranks,
        training=training,
        saved=saved,
    )


@pytest.mark.parametrize(
    ("arguments", "on_cuda", "on_cpu"),
    [
        ((), True, False),
        ((BUDGET,), True, True),
        (ZBV, False, False),
        ((*ZBV, "--compile.components=loss"), True, False),
        (EMULATED, False, False),
        (ASYNC, True, None),  # refused on CPUs
    ],
)
def test_the_configuration_and_the_kind_of_device_decide(arguments, on_cuda, on_cpu):
    """By the backend, where it is known; else when the run is built. Both give the same."""
    for backend, device, wanted in (("nccl", "cuda", on_cuda), ("gloo", "cpu", on_cpu)):
        if wanted is None:
            continue
        known, later = run_of(AUTO, *arguments, f"--comm.backend={backend}"), run_of(AUTO, *arguments)
        assert known.config.compile.enable is wanted
        assert later.on_device(device).config.compile.enable is wanted
        (notice,) = [notice for notice in known.spec.notices if "compile.enable" in notice]
        assert f'"auto" is {json.dumps(wanted)}: ' in notice


def test_nothing_else_decides(tmp_path):
    """Neither a cache nor the number of ranks."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernel.so").touch()
    warm = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    for environ in ({}, warm):
        for ranks in (1, 2, 8):
            for backend, compiled in (("nccl", True), ("gloo", False)):
                run = run_of(AUTO, f"--comm.backend={backend}", environ=environ, ranks=ranks)
                assert run.config.compile.enable is compiled


def test_a_value_is_never_changed():
    for value in (True, False):
        run = run_of(f"--compile.enable={value}", "--comm.backend=nccl")
        assert run.config.compile.enable is run.on_device("cpu").config.compile.enable is value


def test_a_resumed_run_keeps_the_choice_and_not_that_of_its_new_device():
    def resumed(content, *arguments):
        saved = lambda folder, step: {"config": {"compile": {"enable": content}}}  # noqa: E731
        return run_of("--checkpoint.enable", *arguments, saved=saved)

    for kept in (True, False):
        for backend in ("gloo", "nccl"):
            run = resumed(kept, AUTO, f"--comm.backend={backend}")
            assert run.config.compile.enable is kept
            assert any("the value of the checkpoints in" in notice for notice in run.spec.notices)
    assert resumed(True, "--compile.enable=false").config.compile.enable is False
    assert resumed(True).config.compile.enable is False  # the default is no "auto"
    assert resumed("auto", AUTO, "--comm.backend=nccl").config.compile.enable is True
    assert resumed(7, AUTO, "--comm.backend=gloo").config.compile.enable is False


def test_the_estimate_is_that_of_the_choice():
    """On a GPU compiled blocks recompute what is cheap, so their peak is another one."""
    none = "--activation_checkpoint.mode=none"
    auto, compiled, eager = (
        estimate(run_of(none, f"--compile.enable={value}", "--training.seq_len=512"), None).worst.peak.total
        for value in ("auto", "true", "false")
    )
    assert auto == compiled < eager


def test_dry_run_and_card_show_it(capsys: pytest.CaptureFixture[str]):
    def row(*arguments):
        main([*arguments], {"DRY_RUN": "1", "NGPU": "1"})
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("  compile ")]

    assert row() == ["  compile      off"]
    assert row(AUTO) == ["  compile      auto: on GPUs (model, loss; inductor), off on a CPU"]
    assert row(AUTO, "--comm.backend=nccl") == ["  compile      on (model, loss; inductor)"]
    assert row(AUTO, "--estimate.device=h100") == ["  compile      on (model, loss; inductor)"]
    assert row(AUTO, "--estimate.device=cpu") == row(AUTO, "--comm.backend=gloo") == ["  compile      off"]
    assert messages.compilation(run_of(AUTO).config.compile).startswith("auto: on GPUs")
