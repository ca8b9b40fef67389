"""What asynchronous tensor parallelism asks of torch's compiler, which finds nothing to overlap otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch._inductor.config
import torch.distributed as dist
from torch.distributed import _symmetric_memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from quadriga.errors import UserError
from quadriga.parallel import tensor_parallel


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def mesh_on(device_type: str, group: dist.ProcessGroup) -> Any:
    return SimpleNamespace(device_type=device_type, get_group=lambda: group)


def test_the_compiler_may_split_the_collectives_of_the_group(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 2.13, torch's pass over the graph leaves the collectives of other groups as they are, and says nothing."""
    enabled: dict[str, object] = {}
    monkeypatch.setattr(_symmetric_memory, "_group_name_to_store", enabled)
    monkeypatch.setattr(torch._inductor.config, "_micro_pipeline_tp", False)
    tensor_parallel._overlap_communication(mesh_on("cuda", group))
    assert torch._inductor.config._micro_pipeline_tp
    assert list(enabled) == [group.group_name]


def test_a_cpu_is_refused(group: dist.ProcessGroup) -> None:
    with pytest.raises(UserError, match="symmetric memory of GPUs"):
        tensor_parallel._overlap_communication(mesh_on("cpu", group))
