"""What ranks inherit: the fork server of `ranks.py` imports this once, and every rank that it forks has it all.

A rank that imports the trainer itself spends more time on that than on a few steps of a small model. Only imports stand
here: a process that has worked already (OpenMP, a process group, a seed that was drawn from) must not be forked.
"""

from __future__ import annotations

import gc

import numpy  # noqa: F401
import torch
import torch._dynamo  # otherwise imported by the first optimizer step of every rank
import torch._subclasses.fake_tensor
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg  # tests/fake_ranks.py
import torch.utils.serialization  # by the first checkpoint  # noqa: F401

import quadriga.checkpoint.tensors
import quadriga.config
import quadriga.log
import quadriga.models.llama.model
import quadriga.planning
import quadriga.rehearsal.rehearse
import quadriga.train.loop  # noqa: F401

# The collector leaves these objects alone from now on, so that a rank does not copy the pages they lie in.
gc.collect()
gc.freeze()
