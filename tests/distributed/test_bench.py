"""Benches of real launches: they take turns, can be stopped and go on, and say rightly what they measured."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from host_slots_backend import environ_with_host_slots
from launching import ROOT, Running, is_alive, launch, wait_until

CLI = [sys.executable, "-m", "quadriga.cli"]
DEBUG = str(ROOT / "configs/debug/debug.toml")
SMALL = {
    "model.dim": 64,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 4,
    "model.ffn_dim": 128,
    "training.seq_len": 32,
    "training.global_batch_size": 2,
    "training.local_batch_size": 1,
}
KEYS = [argument for key, value in SMALL.items() for argument in (f"--{key}", str(value))]
MODE = "activation_checkpoint.mode=none,full"
REDUCE = "parallelism.reduce_gradients=once,every_micro_batch"
COLOUR = "metrics.disable_color_printing=false,true"


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # several wait for each other where tests share cores


def bench(folder: Path, varied: str, *more: str) -> list[str]:
    return [*CLI, "bench", DEBUG, "--vary", varied, "--out", str(folder), *KEYS, *more]


def finished(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/*/events.jsonl") if '"reason": "finished"' in path.read_text())


@pytest.mark.slow
def test_a_bench_that_was_interrupted_goes_on(tmp_path):
    """Ctrl-C during the second of two runs: it ends at once, nothing is left behind, the first run is kept."""
    command = bench(tmp_path / "out", MODE, "--repeat", "1", "--ngpu", "1", "--steps", "17")
    running = Running(command, ONE_THREAD)
    second = tmp_path / "out/setting-2/repeat-1/metrics.jsonl"
    try:
        assert wait_until(lambda: second.exists() and second.read_text().count("\n") > 1, 120)
        process_tree = running.process_tree()
        running.process.send_signal(signal.SIGINT)
        stopped = running.end()
        assert stopped.code == 128 + signal.SIGINT
        assert "run 2 of 2: round 1, mode=full: ended by SIGINT; the same command continues from here" in stopped.err
        assert "Traceback" not in stopped.err
        assert wait_until(lambda: not any(map(is_alive, process_tree)), 20)
    finally:
        running.kill_all()
    first = tmp_path / "out/setting-1/repeat-1"
    assert finished(tmp_path / "out") == [first]
    before = (first / "metrics.jsonl").read_text()

    ended = launch(command, ONE_THREAD)
    assert ended.code == 0, ended.err
    assert "run 1 of 2: round 1, mode=none: finished before" in ended.err
    assert ended.out.startswith("too few runs: 1 pair, at least 3 are needed (mode=none ")
    assert (first / "metrics.jsonl").read_text() == before
    assert len(finished(tmp_path / "out")) == 2
    configs = [(tmp_path / f"out/setting-{n}/repeat-1/config.toml").read_text() for n in (1, 2)]
    unlike = [one for one, other in zip(*(text.splitlines() for text in configs), strict=True) if one != other]
    assert [line.split(" = ")[0] for line in unlike] == ["dump_folder", "mode"]


@pytest.mark.slow
def test_a_killed_bench_leaves_no_run_behind(tmp_path):
    running = Running(bench(tmp_path / "out", MODE, "--repeat", "1", "--ngpu", "2", "--steps", "5000"), ONE_THREAD)
    first = tmp_path / "out/setting-1/repeat-1/metrics.jsonl"
    try:
        assert wait_until(first.exists, 120)
        process_tree = running.process_tree()
        assert len(process_tree) >= 5  # bench, launcher, agent, two ranks
        running.process.kill()
        assert wait_until(lambda: not any(map(is_alive, process_tree)), 30)
    finally:
        running.kill_all()


@pytest.mark.slow
def test_a_failing_run_stops_the_bench_with_its_own_message(tmp_path):
    """A loss that jumps by any amount stops the run: exit code 5, which the bench hands on."""
    out = tmp_path / "out"
    command = bench(out, MODE, "--repeat", "1", "--ngpu", "1", "--steps", "17", "--health.spike", "raise")
    command += ["--health.spike_sigmas", "0.001", "--health.spike_window", "2"]
    ended = launch(command, ONE_THREAD)
    assert ended.code == 5, ended.err
    assert "run 1 of 2: round 1, mode=none: failed with exit code 5" in ended.err
    assert "give the same command again: finished runs are kept" in ended.err
    assert "Traceback" not in ended.err
    assert not (out / "setting-2").exists()


@pytest.mark.slow
def test_each_backend_is_credited_with_what_it_carried(tmp_path):
    """Two that carry the same bytes in different ways on a CPU; the traces of both say which it was."""
    varied = "comm.backend=gloo,host-slots"
    keys = ["--training.mixed_precision_reduce", "float32", "--json"]
    environ = {**ONE_THREAD, **environ_with_host_slots(tmp_path / "hook")}
    ended = launch(bench(tmp_path / "out", varied, "--repeat", "1", "--ngpu", "2", "--steps", "17", *keys), environ)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [(each["asked"], each["credited"]) for each in found["backend"]] == [("gloo", True), ("host-slots", True)]
    for each in found["backend"]:
        assert next((row["axis"], row["backend"]) for row in each["carried"]) == ("shard", each["asked"])
    assert found["losses"]["largest_difference"]["value"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("varied", "differs"), [(REDUCE, True), (COLOUR, False)], ids=["reduction", "colour of lines"])
def test_a_bench_says_rightly_whether_there_is_a_difference(varied, differs, tmp_path):
    """Reducing gradients after each of 8 micro-batches costs half of the speed; the colour of lines that no terminal
    shows costs none. At 95 %, one bench in twenty errs by design, and five rounds of a busy machine may be too few:
    each has two tries."""
    keys = ["--model.dim", "256", "--model.ffn_dim", "512", "--training.global_batch_size", "16", "--json"]
    verdicts = []
    for attempt in range(2):
        command = bench(tmp_path / str(attempt), varied, "--repeat", "5", "--ngpu", "2", "--steps", "20", *keys)
        ended = launch(command, ONE_THREAD, timeout=900)
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        verdicts.append(found["figures"][0]["ratios"][0]["verdict"])
        assert found["losses"]["largest_difference"]["value"] <= (1e-4 if differs else 0.0)
        assert all(each["credited"] and each["asked"] == "gloo" for each in found["backend"])
        assert found["where"] is not None
        if verdicts[-1] == ("slower" if differs else "no difference shown"):
            return
    pytest.fail(f"{varied}: {verdicts}")
