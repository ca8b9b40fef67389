"""The global norm of gradients that are cut, copied, uneven, empty, or over two meshes."""

from __future__ import annotations

import pytest
import torch
from clipping import clip_gradients, global_norm
from ranks import RankError, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

SHAPES = [(6, 5), (3, 7), (1, 4), (9,), (2,)]  # over four ranks: uneven, and with empty shares


def whole_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def norms_of_layouts() -> tuple[list[float], list[bool]]:
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    layouts = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Replicate()]),
        (square, [Shard(0), Shard(0)]),
        (square, [Shard(0), Shard(-1)]),
    ]
    norms, clipped = [], []
    for mesh, placements in layouts:
        parameters = []
        for number, gradient in enumerate(whole_gradients()):
            parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, placements))
            parameter.grad = distribute_tensor(gradient, mesh, placements)
            if number == 3:  # and one that lies on another mesh, and one that is not cut at all
                parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(gradient), line, [Shard(0)]))
                parameter.grad = distribute_tensor(gradient, line, [Shard(0)])
            if number == 4:
                parameter = torch.nn.Parameter(torch.zeros_like(gradient))
                parameter.grad = gradient
            parameters.append(parameter)
        norms.append(clip_gradients(parameters, 1.0).item())
        after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
        expected = [gradient / norms[0] for gradient in whole_gradients()]
        clipped.append(all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(after, expected, strict=True)))
    return norms, clipped


def norm_of_a_pending_sum() -> None:
    mesh = init_device_mesh("cpu", (2,))
    global_norm([DTensor.from_local(torch.ones(3), mesh, [Partial()])])


def test_the_norm_is_the_same_on_every_layout() -> None:
    expected = global_norm(whole_gradients()).item()
    for norms, clipped in run_ranks(norms_of_layouts, 4):
        assert norms == pytest.approx([expected] * len(norms), rel=1e-7)
        assert all(clipped)


def test_a_gradient_that_is_not_reduced_yet_has_no_norm() -> None:
    with pytest.raises(RankError, match="reduce it before taking the norm"):
        run_ranks(norm_of_a_pending_sum, 2)
