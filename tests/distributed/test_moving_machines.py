"""Between machines with and without CUDA: random generators are those of the run's device, and gloo opens no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from ranks import run_ranks
from training import DEBUG_FILE, TINY, one_rank

from quadriga.checkpoint.folder import find_complete
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.tensors import RandomState
from quadriga.config.schema import Checkpoint
from quadriga.metrics.jsonl import read_metrics


class Generators:
    """Random states as a machine would save them: those of `names`, each a few bytes of this value."""

    def __init__(self, value: int, *names: str, size: int = 16) -> None:
        self.held = {name: torch.full((size,), value, dtype=torch.uint8) for name in names}
        self.loaded: dict[str, torch.Tensor] | None = None

    def state_dict(self):
        return self.held

    def load_state_dict(self, loaded):
        self.loaded = dict(loaded)


def messages_on_resume(folder, saved: Generators, here: Generators, monkeypatch) -> list[str]:
    """What is told when a run that has `here` goes on from `saved`."""
    messages: list[str] = []
    monkeypatch.setattr(
        "quadriga.log.logger.info", lambda text, *values: messages.append(text % values if values else text)
    )
    one = CheckpointManager(Checkpoint(enable=True), folder)
    one.save(1, {"random": saved}, {})
    one.load(one.find(), {"random": here})
    return [line for line in messages if "random" in line]


def test_generators_of_a_gpu_have_no_use_on_a_cpu(tmp_path, monkeypatch):
    here = Generators(0, "0.torch")
    messages = messages_on_resume(tmp_path, Generators(7, "0.torch", "0.cuda"), here, monkeypatch)
    assert messages == ["random generators of the checkpoint that this run does not use: cuda"]
    assert here.loaded["0.torch"].eq(7).all()


def test_generators_that_the_checkpoint_lacks_begin_anew(tmp_path, monkeypatch):
    here = Generators(0, "0.torch", "0.cuda")
    messages = messages_on_resume(tmp_path, Generators(7, "0.torch"), here, monkeypatch)
    assert messages == ["random generators that are not in the checkpoint start anew: cuda"]
    assert list(here.loaded) == ["0.torch"]
    assert here.held["0.cuda"].eq(0).all()


def test_a_state_of_another_size_begins_anew(tmp_path, monkeypatch):
    """Of another version of a library."""
    here = Generators(0, "0.torch", size=20)
    messages = messages_on_resume(tmp_path, Generators(7, "0.torch"), here, monkeypatch)
    assert messages == ["random generators that are not in the checkpoint start anew: torch"]
    assert here.loaded == {}


def test_on_a_cpu_no_generator_of_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *given: 1 / 0)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: 1 / 0)
    states = RandomState(0).state_dict()
    assert sorted(states) == ["0.numpy", "0.python", "0.torch"]
    RandomState(0).load_state_dict({**states, "0.cuda": torch.zeros(16, dtype=torch.uint8)})


def test_on_a_gpu_its_own_generator_is_kept_and_put_back(monkeypatch):
    device, seen = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda at: torch.full((16,), at.index, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: seen.append((state, at)))
    states = RandomState(5, device).state_dict()
    assert states["5.cuda"].eq(3).all()
    RandomState(5, device).load_state_dict(states)
    ((state, at),) = seen
    assert (at, bool(state.eq(3).all())) == (device, True)
    RandomState(5, device).load_state_dict({})
    assert len(seen) == 1


def train_beside_a_gpu(argv: list[str]) -> int:
    """Train as on a machine that has a GPU, where opening it ends the run."""

    def opened(*given, **named):
        raise AssertionError("CUDA was opened")

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda._is_compiled = lambda: True
    for name in ("_lazy_init", "init", "current_device", "current_stream", "synchronize", "get_device_properties"):
        setattr(torch.cuda, name, opened)
    for name in ("get_device_name", "get_device_capability", "get_rng_state", "set_rng_state", "memory_stats"):
        setattr(torch.cuda, name, opened)
    real = torch.empty_like, torch.zeros, torch.full

    def unpinned(make):
        def made(*given, pin_memory=False, **named):
            assert not pin_memory, "memory was pinned, which opens CUDA"
            return make(*given, **named)

        return made

    torch.empty_like, torch.zeros, torch.full = map(unpinned, real)
    os.environ["COMM_BACKEND"] = "gloo"
    return one_rank(argv)


def test_over_gloo_a_run_opens_no_gpu(tmp_path: Path):
    """Training, saves in the foreground and in the background, a resume, traces, pinned batches asked for."""
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *TINY]
    argv = [argument for argument in argv if argument != "--profiling.no_enable_profiling"]
    argv += ["--checkpoint.enable", "--checkpoint.interval=2", "--lr_scheduler.total_steps=4"]
    argv += ["--training.dataloader.pin_memory", "--profiling.enable_profiling"]
    argv += ["--validation.enable", "--validation.dataset=builtin_validation", "--validation.steps=1"]
    for steps, mode in ((2, "disabled"), (4, "async_with_pinned_mem")):
        more = [f"--training.steps={steps}", f"--checkpoint.async_mode={mode}"]
        assert run_ranks(train_beside_a_gpu, 2, [*argv, *more], backend=None, timeout=120) == [0, 0]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert find_complete(tmp_path / "checkpoint").step == 4
