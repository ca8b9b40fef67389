"""What the transport over NVSHMEM relies on in torch, as far as a build without CUDA can tell."""

from __future__ import annotations

import pytest
import torch

from quadriga.comm import nvshmem


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nvshmem_put_with_signal", ["tensor", "sigpad", "signal", "peer"]),
        ("nvshmem_wait_for_signal", ["sigpad", "signal", "peer"]),
    ],
)
def test_the_operations_take_what_they_are_given(name: str, arguments: list[str]) -> None:
    schema = getattr(torch.ops.symm_mem, name).default._schema
    assert [argument.name for argument in schema.arguments] == arguments
    assert schema.returns == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build has CUDA, and may have NVSHMEM")
def test_a_build_without_cuda_offers_none() -> None:
    assert not nvshmem.is_offered()
