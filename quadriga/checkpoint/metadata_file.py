"""Reads `.metadata` of torch.distributed.checkpoint without unpickling it: see `opcodes`."""

from __future__ import annotations

from quadriga.checkpoint.metadata_entries import read_entries
from quadriga.checkpoint.plan import Plan, validate_plan


def read_plan(data: bytes) -> Plan:
    """The plan in the bytes of a `.metadata`. Raises PlanError if the bytes are anything else."""
    return validate_plan(read_entries(data).plan)
