"""The Python API trains as the command line does, and leaves its process as it was. Each test in a forked process."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import ROOT, TRAIN, launch, launch_environ
from ranks import run_ranks
from sockets import listeners
from training import DEBUG_FILE, TINY, train

import quadriga

SMALL = (*TINY, "--training.global_batch_size=2")
VALIDATION = (
    *("--validation.enable", "--validation.dataset=builtin", "--validation.seq_len=32"),
    *("--validation.steps=2", "--validation.local_batch_size=1", "--validation.freq=3"),
)
TIMES = {"time", "elapsed_seconds", "step_seconds", "seconds", "eta_seconds", "tflops", "mfu", "data_wait", "attempt"}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function` in a process that torchrun did not start."""
    return run_ranks(_without_torchrun, 1, function, args, backend=None, timeout=120.0)[0]


def _without_torchrun(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC") or name.endswith("RANK") or "WORLD_SIZE" in name or "MASTER" in name:
            del os.environ[name]
    return function(*args)


def built(folder: Path, *keys: str, log: bool = False) -> quadriga.Trainer:
    config = quadriga.load_config(DEBUG_FILE, [*SMALL, f"--job.dump_folder={folder}", "--training.steps=6", *keys])
    return quadriga.build(quadriga.resolve(config), log=log)


def steps(trainer: quadriga.Trainer, count: int) -> list[float]:
    return [float(trainer.step().loss) for _ in range(count)]


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a kind, without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in each.items() if key not in TIMES and not key.startswith(("tokens_per", "memory"))}
        for each in found
        if each["kind"] == kind
    ]


def events(folder: Path) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(each["event"], each["step"]) for each in found]


def without_waits(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in each.items() if key != "data_wait_share"} for each in found]


def whole_run(folder: Path) -> list[float]:
    with built(folder, *VALIDATION) as trainer:
        losses = steps(trainer, 6)
        assert trainer.finished
        return losses


def test_a_run_is_that_of_the_command_line(tmp_path):
    """Losses, validation, events and checkpoint of six steps, to the bit."""
    losses = alone(whole_run, tmp_path / "api")
    arguments = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path / "cli"), "--training.steps=6"]
    done = launch([*TRAIN, *arguments, *SMALL, *VALIDATION], {"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err
    assert losses == [record["loss"] for record in records(tmp_path / "cli")]
    for kind in ("train", "validation", "backends"):
        assert without_waits(records(tmp_path / "api", kind)) == without_waits(records(tmp_path / "cli", kind))
    assert len(records(tmp_path / "api", "validation")) == 3
    assert events(tmp_path / "api") == events(tmp_path / "cli")
    assert tensors(tmp_path / "api") == tensors(tmp_path / "cli")


def tensors(folder: Path) -> dict[str, Any]:
    """The tensors of step 6: weights, moments, and the generator that the seed sets."""
    from quadriga.checkpoint.stored import load_tensor, open_stored

    stored = open_stored(folder / "checkpoint/step-6", None)
    names = [name for name in stored.plan.tensors if not name.endswith((".python", ".numpy"))]
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer", "random"}
    return {name: load_tensor(stored, name).tolist() for name in names}


def two_builds(folder: Path) -> tuple[list[float], list[float]]:
    """Half of a run, the process as before, the other half; with evaluations and saves in between."""
    import torch

    logger = logging.getLogger("quadriga")
    own = logging.NullHandler()
    logger.addHandler(own)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]

    def process() -> tuple[Any, ...]:
        threads = {thread.name for thread in threading.enumerate()}
        numerics = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        handlers = [signal.getsignal(number) for number in numbers]
        drawn = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        log = (list(logger.handlers), logger.level, logger.propagate)
        return dict(os.environ), threads, numerics, handlers, drawn, log, gc.isenabled()

    torch.manual_seed(17)
    halves = []
    for half in range(2):
        before = process()
        trainer = built(folder, *VALIDATION, "--debug.deterministic", log=True)
        assert logger.handlers != [own]
        assert os.environ != before[0]
        with trainer:
            assert trainer.state.step == 3 * half
            losses = [trainer.evaluate()]
            assert signal.getsignal(signal.SIGTERM) == before[3][1]  # a kill of an idle notebook kills it
            losses += steps(trainer, 3)
            assert trainer.save() == trainer.save() == str(folder / f"checkpoint/step-{3 * half + 3}")
            losses += [trainer.evaluate()]
            assert gc.isenabled()
        assert process() == before
        assert not torch.distributed.is_initialized()
        trainer.close()
        halves.append(losses)
    return halves[0], halves[1]


def test_two_trainers_one_after_the_other(tmp_path):
    first, second = alone(two_builds, tmp_path / "halves")
    whole = alone(whole_run, tmp_path / "whole")
    assert first[1:4] + second[1:4] == whole
    assert first[-1] == second[0]  # the validation of a resumed run is that of the run before
    assert events(tmp_path / "halves").count(("end", 3)) == 1


def opened(folder: Path) -> tuple[list[str | None], list[bool]]:
    """The interface that gloo is told before, during and after a trainer, and whether each socket is local."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    told = [os.environ.get("GLOO_SOCKET_IFNAME")]
    with built(folder) as trainer:
        trainer.step()
        told.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        local = [each.is_loopback for each in listeners([os.getpid()])]
    return [*told, os.environ.get("GLOO_SOCKET_IFNAME")], local


def test_a_trainer_listens_on_the_loopback_alone(tmp_path):
    told, local = alone(opened, tmp_path)
    assert told == [None, "lo", None]
    assert local
    assert all(local)


def requests(folder: Path) -> list[tuple[str, int, int]]:
    """What SIGINT, SIGTERM, and the file STOP do."""
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    outcomes = []
    with built(folder) as trainer:
        forward = trainer._parts.step_config.forward_backward
        send: list[int] = []

        def interrupted(batch: Any, *, reduce: bool, last: bool) -> torch.Tensor:
            while send:
                os.kill(os.getpid(), send.pop())
            return train_batch(batch, reduce=reduce, last=last)

        train_batch = forward.train
        object.__setattr__(forward, "train", interrupted)
        for number in (signal.SIGINT, signal.SIGTERM):
            send.append(number)
            try:
                trainer.step()
            except (KeyboardInterrupt, quadriga.Stopped) as error:
                outcomes.append((type(error).__name__, getattr(error, "exit_code", 0), trainer.state.step))
        with pytest.raises(quadriga.Fault, match="asked to stop"):
            trainer.step()
    with built(folder) as trainer:
        object.__setattr__(trainer._parts.stop_requests, "_last_poll", -10.0)
        (folder / "STOP").touch()
        with pytest.raises(quadriga.Stopped) as stopped:
            trainer.step()
        outcomes.append((type(stopped.value).__name__, stopped.value.exit_code, trainer.state.step))
    assert not (folder / "STOP").exists()
    return outcomes


def test_signals_and_stop_files(tmp_path):
    expected = [("KeyboardInterrupt", 0, 1), ("Stopped", 75, 2), ("Stopped", 75, 3)]
    assert alone(requests, tmp_path) == expected
    ends = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(each["code"], each["reason"]) for each in ends if each["event"] == "end"] == [(75, "asked to leave")] * 2


def failures(folder: Path) -> None:
    """Errors before, in, and after a step; each leaves a process in which the next trainer works."""
    import torch

    with built(folder, "--checkpoint.no_enable") as trainer:
        with pytest.raises(quadriga.UserError, match="a process group already"):
            built(folder / "other")
        with pytest.raises(quadriga.UserError, match=r"validation\.enable"):
            trainer.evaluate()
        with pytest.raises(quadriga.UserError, match=r"checkpoint\.enable"):
            trainer.save()
        steps(trainer, 6)
        with pytest.raises(quadriga.UserError, match=r"training\.steps = 6"):
            trainer.step()
    with pytest.raises(quadriga.Fault, match="it is closed"):
        trainer.step()
    with pytest.raises(quadriga.UserError, match="WORLD_SIZE"):
        quadriga.build(quadriga.resolve(quadriga.load_config(DEBUG_FILE, TINY), ranks=4))
    with pytest.raises(quadriga.UserError, match="create_seed_checkpoint"):
        built(folder, "--checkpoint.create_seed_checkpoint")
    before = dict(os.environ)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("{broken\n" * 200)
    with pytest.raises(quadriga.UserError, match=r"corpus\.jsonl"):
        built(folder / "data", "--training.dataset=jsonl", f"--training.dataset_path={corpus}")
    trainer = built(folder / "data")
    steps(trainer, 2)
    trainer.state.loader.next = unreadable
    with pytest.raises(quadriga.UserError, match="a record cannot be read"):
        trainer.step()
    with pytest.raises(quadriga.Fault, match="it failed"):
        trainer.save()
    trainer.close()
    assert not torch.distributed.is_initialized()
    assert before == dict(os.environ)
    assert events(folder / "data")[-1] == ("fault", 2)
    with built(folder / "data") as trainer:
        assert trainer.state.step == 2  # saved before the error was raised


def unreadable() -> None:
    raise quadriga.UserError(quadriga.Problem("a.jsonl", "a record cannot be read"))


def test_errors_leave_a_process_that_works(tmp_path):
    alone(failures, tmp_path)


def on_two_ranks(folder: Path) -> list[float]:
    with built(folder) as trainer:
        losses = steps(trainer, 2)
        trainer.save()
        return losses + steps(trainer, 4)


def test_ranks_of_torchrun(tmp_path):
    """Two ranks: the losses of the command line, to the bit, with one event log and one set of records."""
    ours = run_ranks(on_two_ranks, 2, tmp_path / "api", backend=None, timeout=120.0)
    theirs = [record["loss"] for record in train(tmp_path / "cli", 2, *SMALL, "--training.steps=6")]
    assert ours == [theirs, theirs]
    assert [event for event, _ in events(tmp_path / "api")][-1] == "end"
    assert len(records(tmp_path / "api")) == 6


def stopped_on_two_ranks(folder: Path) -> tuple[int, int, bool]:
    import torch

    trainer = built(folder, "--training.steps=100")
    trainer.step()
    (folder / "STOP").touch()
    trainer._parts.stop_requests._last_poll = -10.0  # reads the file at the next step
    with pytest.raises(quadriga.Stopped) as stopped, trainer:
        steps(trainer, 99)
    return stopped.value.exit_code, trainer.state.step, torch.distributed.is_initialized()


def test_ranks_stop_together(tmp_path):
    """Both at the same step, saved, with an end in the event log and no file STOP left."""
    first, second = run_ranks(stopped_on_two_ranks, 2, tmp_path, backend=None, timeout=120.0)
    code, step, initialized = first
    assert first == second
    assert (code, initialized) == (75, False)
    assert (tmp_path / f"checkpoint/step-{step}").is_dir()
    assert events(tmp_path)[-1] == ("end", step)
    assert not (tmp_path / "STOP").exists()


@pytest.mark.more
def test_the_example_runs(tmp_path):
    """`examples/notebook.py` as a script, and cell by cell; it has at most 40 lines."""
    example = ROOT / "examples/notebook.py"
    source = example.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environ = launch_environ({"OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-W", "error", str(example)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    losses = [float(line.split()[3].rstrip(",")) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 2
    assert (tmp_path / "outputs/notebook/checkpoint/step-20").is_dir()
    again = "for cell in open(sys.argv[1]).read().split('# %%'): exec(cell.partition('\\n')[2], globals())"
    command = [sys.executable, "-c", f"import sys\n{again}", str(example)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert "step 20: " not in done.stdout  # the run was finished
    assert "validation loss" in done.stdout
