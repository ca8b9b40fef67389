"""Which backend a run uses, which axis it serves, and which requests are refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from quadriga.comm.backend import (
    BACKENDS,
    NCCL_SYMMETRIC,
    NVSHMEM,
    Machine,
    backend_by_axis,
    choose_backend,
    format_backends,
)
from quadriga.config.run_spec import Degrees
from quadriga.errors import UserError

CPU = Machine(cuda=False, torch="2.13.0+cpu")
H100 = Machine(True, "2.13.0+cu130", {NCCL_SYMMETRIC: True, NVSHMEM: True}, (9, 0))


@pytest.mark.parametrize(
    ("requested", "machine", "chosen"),
    [
        (None, H100, "nccl"),
        (None, CPU, "gloo"),
        ("", CPU, "gloo"),
        ("gloo", H100, "gloo"),
        ("gloo", CPU, "gloo"),
        ("nccl", H100, "nccl"),
        ("nccl-symm", H100, "nccl-symm"),
        ("nvshmem", H100, "nvshmem"),
        ("nvshmem", replace(H100, capability=(8, 0)), "nvshmem"),
        ("nvshmem", Machine(cuda=True), "nvshmem"),  # what is not known here is asked by the ranks
    ],
)
def test_the_request_counts_and_the_machine_decides_where_there_is_none(
    requested: str | None, machine: Machine, chosen: str
) -> None:
    assert choose_backend(requested, machine) == chosen


@pytest.mark.parametrize(
    ("requested", "machine", "expected"),
    [
        ("nccl", CPU, "none is visible here"),
        ("nccl-symm", CPU, "none is visible here"),
        ("nvshmem", CPU, "none is visible here"),
        (
            "nvshmem",
            replace(H100, offers={NVSHMEM: False}),
            r"2\.13\.0\+cu130 does not offer NVSHMEM(.|\n)*nvidia-nvshmem",
        ),
        ("nccl-symm", replace(H100, offers={NCCL_SYMMETRIC: False}), "PyTorch 2.13 or newer"),
        ("nccl-symm", replace(H100, capability=(8, 0)), r"capability 9\.0, but this device has 8\.0"),
        ("nvshmem", replace(H100, capability=(6, 1)), r"capability 7\.0, but this device has 6\.1"),
    ],
)
def test_what_cannot_be_had_is_refused_and_never_replaced(requested: str, machine: Machine, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        choose_backend(requested, machine)


def test_an_unknown_name_is_met_with_the_nearest_one() -> None:
    with pytest.raises(UserError) as refusal:
        choose_backend("ncll", H100)
    problem = refusal.value.problems[0]
    assert (problem.nearest, problem.allowed) == ("nccl", "gloo, nccl, nccl-symm, nvshmem")


FSDP_4 = Degrees(dp_shard=4)
ALL_AXES = Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2)


@pytest.mark.parametrize(
    ("backend", "degrees", "expected"),
    [
        ("gloo", FSDP_4, "gloo: shard, norms, host"),
        ("nccl", FSDP_4, "nccl: shard, norms; gloo: host"),
        ("nccl-symm", FSDP_4, "nccl-symm: shard; nccl: norms; gloo: host"),
        ("nvshmem", ALL_AXES, "nvshmem: shard; nccl: dp_replicate, cp, tp, pp, norms; gloo: host"),
        ("nvshmem", Degrees(cp=2), "nvshmem: shard; nccl: cp, norms; gloo: host"),
        ("nccl", Degrees(), "nothing is sent"),
    ],
)
def test_every_axis_has_its_backend(backend: str, degrees: Degrees, expected: str) -> None:
    assert format_backends(backend_by_axis(backend, degrees)) == expected


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100 %"), (0.99999, "over 99.9 %"), (0.894, "89.4 %"), (0.01, "1 %"), (1e-9, "under 0.1 %"), (0.0, "0 %")],
)
def test_a_share_is_not_rounded_to_all_or_nothing(share: float, shown: str) -> None:
    assert format_backends({"shard": "nvshmem"}, {"nvshmem": share}) == f"nvshmem: shard ({shown})"


def test_facts_name_themselves_and_others_that_are_there() -> None:
    assert {name: facts.name for name, facts in BACKENDS.items()} == {name: name for name in BACKENDS}
    assert {facts.fallback_backend for facts in BACKENDS.values() if facts.fallback_backend} <= BACKENDS.keys()


def test_asking_imports_no_torch() -> None:
    code = "import sys, quadriga.comm.backend, quadriga.comm.heap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
