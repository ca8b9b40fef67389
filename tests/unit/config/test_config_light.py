"""Reading and checking a configuration is quick and loads no torch: asked in fresh interpreters."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

READ = """
import sys
from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.models.registry import catalogue
file = sys.argv[1]
run = read(["--job.config_file", file], {}, catalogue=catalogue(), backends=BACKENDS, world_size=4, training=False)
assert run.spec.world_size == 4
heavy = {"torch", "numpy", "rich", "tokenizers", "datasets", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def seconds_to(root, *command):
    """Processor seconds, the best of a few: what the machine is busy with otherwise is not meant."""
    environ = {**os.environ, "PYTHONPATH": str(root)}
    times = []
    for _ in range(5):
        before = processor_seconds()
        subprocess.run([sys.executable, *command], cwd=root, env=environ, check=True, stdout=subprocess.DEVNULL)
        times.append(processor_seconds() - before)
    return min(times)


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_reading_and_checking_takes_less_than_half_a_second(root):
    slow_machine = 4 * seconds_to(root, "-c", "from pydantic import BaseModel")  # reading has one of them
    assert seconds_to(root, "-c", READ, "configs/llama3_8b/llama3_8b.toml") < max(0.5, slow_machine)


def test_help_is_quicker_still(root):
    assert seconds_to(root, "-m", "quadriga.cli", "--help") <= 0.12
