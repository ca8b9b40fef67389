"""The entry path that existing launch scripts name: `torchrun --nproc_per_node=4 torchtitan/train.py ...`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, in place of this folder

from quadriga.train.__main__ import run_rank  # noqa: E402

run_rank()
