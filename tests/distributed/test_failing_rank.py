"""A rank that fails, while the run is set up or within a step, ends the run in seconds with its own error last."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, Running, is_alive, replace_loop, wait_until
from training import TINY

# The real loop, in which rank 1 fails: before it builds anything, or within the forward pass of its second step, when
# the others wait for what it would send.
LOOP = str(ROOT / "quadriga" / "train" / "loop.py")
FAILING = f"""
import importlib.util, os
specification = importlib.util.spec_from_file_location("quadriga.train.real_loop", {LOOP!r})
loop = importlib.util.module_from_spec(specification)
specification.loader.exec_module(loop)
run, real_build = loop.run, loop.build_trainer

def fail(*_):
    raise ValueError("broken on purpose in " + os.environ["FAILS_IN"])

def build(*given):
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "set-up":
        fail()
    trainer = real_build(*given)
    if os.environ["RANK"] == "1":
        def hook(*_):
            if trainer.state.step == 1:
                fail()
        trainer.state.parts[0].register_forward_pre_hook(hook)
    return trainer

loop.build_trainer = build
"""
LAYOUTS = {
    "FSDP": ("--parallelism.data_parallel_shard_degree=2",),
    "DDP": ("--parallelism.data_parallel_shard_degree=1", "--parallelism.data_parallel_replicate_degree=2"),
    "TP": ("--parallelism.tensor_parallel_degree=2",),
    "CP": ("--parallelism.context_parallel_degree=2",),
    "PP": ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"),
}
QUICK = (("FSDP", "a step"), ("PP", "set-up"))
SLOW = (("DDP", "a step"), ("TP", "a step"), ("CP", "a step"), ("PP", "a step"), ("FSDP", "set-up"))
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("layout", "place"), CASES)
def test_its_error_is_the_last_and_nothing_is_left(layout: str, place: str, tmp_path: Path) -> None:
    environ = {"NGPU": "2", "FAILS_IN": place, **replace_loop(tmp_path / "hook", FAILING)}
    keys = [*TINY, "--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin", *LAYOUTS[layout]]
    running = Running([*LAUNCH, *keys, "--job.dump_folder", str(tmp_path / "run")], environ)
    try:
        assert wait_until(lambda: running.process.poll() is not None or not running.process_tree(), 150)
        ended = running.end()
        assert len(running.seen) > 3, "launcher, agent and ranks were seen alive"
        assert ended.code == 1
        assert ended.err.strip().splitlines()[-1] == f"ValueError: broken on purpose in {place}"
        assert wait_until(lambda: not any(is_alive(pid) for pid in running.seen), 30)
    finally:
        running.kill_all()
