"""Which backend a run uses, and which requests are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quadriga.comm.backend import BACKENDS, choose
from quadriga.errors import UserError


@pytest.mark.parametrize(
    ("requested", "cuda", "chosen"),
    [
        (None, True, "nccl"),
        (None, False, "gloo"),
        ("", False, "gloo"),
        ("gloo", True, "gloo"),
        ("gloo", False, "gloo"),
        ("nccl", True, "nccl"),
    ],
)
def test_the_request_counts_and_the_machine_decides_where_there_is_none(
    requested: str | None, cuda: bool, chosen: str
) -> None:
    assert choose(requested, cuda) == chosen


def test_what_cannot_be_had_is_refused_and_never_replaced() -> None:
    with pytest.raises(UserError, match="none is visible here"):
        choose("nccl", cuda=False)


def test_a_declared_backend_that_is_not_built_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"nvshmem(.|\n)*does not have this backend yet"):
        choose("nvshmem", cuda=True)


def test_an_unknown_name_is_met_with_the_nearest_one() -> None:
    with pytest.raises(UserError) as refusal:
        choose("ncll", cuda=True)
    problem = refusal.value.problems[0]
    assert (problem.nearest, problem.allowed) == ("nccl", "gloo, nccl")


def test_facts_name_themselves() -> None:
    assert {name: facts.name for name, facts in BACKENDS.items()} == {name: name for name in BACKENDS}


def test_asking_imports_no_torch() -> None:
    code = "import sys, quadriga.comm.backend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
