"""What the launcher reads from variables, and what it finds on the machine."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from quadriga.comm import network
from quadriga.comm.network import INTERFACE_VARIABLES
from quadriga.errors import UserError
from quadriga.launch import environment, supervisor
from quadriga.launch.environment import (
    LaunchRequest,
    TorchBuild,
    launch_backend,
    rank_environment,
    read_launch_request,
    torch_build,
    usable_cores,
    visible_gpus,
)

ROOT = Path(__file__).resolve().parents[3]
CPU_BUILD, CUDA_BUILD = TorchBuild("2.13.0+cpu", None), TorchBuild("2.13.0+cu130", "13.0")


def test_what_torch_offers_is_read_off_its_source() -> None:
    from torch.distributed.fsdp import FSDPModule

    build = torch_build()
    assert build is not None
    assert build.fsdp_symmetric == hasattr(FSDPModule, "set_symm_mem_for_comm")


def test_nothing_set_means_four_ranks_here() -> None:
    assert read_launch_request({}) == (LaunchRequest(ranks=4), [])


def test_several_machines() -> None:
    environ = {"NGPU": "8", "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0:29500", "LOG_RANK": "0,15"}
    request, problems = read_launch_request(environ | {"MAX_RESTARTS": "3"})
    assert problems == []
    assert request == LaunchRequest(ranks=8, nodes=2, node=1, endpoint="node0:29500", restarts=3)
    assert request.world_size == 16


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({"NGPU": "four"}, ["NGPU"]),
        ({"NGPU": "0"}, ["NGPU"]),
        ({"NGPU": "-1", "DRY_RUN": "perhaps"}, ["NGPU", "DRY_RUN"]),
        ({"LOG_RANK": "0,x"}, ["LOG_RANK"]),
        ({"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS"]),
        ({"LOG_RANK": "4", "NGPU": "4"}, ["LOG_RANK"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK"]),
        ({"NNODES": "2"}, ["NODE_RANK", "RDZV_ENDPOINT"]),
        ({"NNODES": "2", "NODE_RANK": "2", "RDZV_ENDPOINT": "node0"}, ["NODE_RANK", "RDZV_ENDPOINT"]),
    ],
)
def test_wrong_variables_are_all_named(environ: dict[str, str], wrong: list[str]) -> None:
    _, problems = read_launch_request(environ)
    assert [problem.where for problem in problems] == wrong


def test_a_dry_run_of_many_machines_needs_no_meeting_point() -> None:
    request, problems = read_launch_request({"NNODES": "64", "NGPU": "8", "DRY_RUN": "1"})
    assert problems == []
    assert request.world_size == 512


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"NODE_RANK": "5", "RDZV_ENDPOINT": "h:29500"}, ["NODE_RANK"]),
        ({"NODE_RANK": "0", "RDZV_ENDPOINT": "host:99999"}, ["RDZV_ENDPOINT"]),
        ({"RDZV_ENDPOINT": "::1"}, ["RDZV_ENDPOINT"]),
        ({"RDZV_ENDPOINT": "host:٣"}, ["RDZV_ENDPOINT"]),
        ({"RDZV_ENDPOINT": "[::1]:29500"}, []),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(values: dict[str, str], wrong: list[str]) -> None:
    environ = {"NNODES": "2", "NGPU": "2", "DRY_RUN": "1"} | values
    assert [problem.where for problem in read_launch_request(environ)[1]] == wrong
    start = read_launch_request({"NODE_RANK": "0"} | environ | {"DRY_RUN": "0"})[1]
    assert [problem.where for problem in start] == wrong


def test_torch_build_is_read_without_importing_it() -> None:
    build = torch_build()
    assert build is not None
    assert build.version.split("+")[0] == importlib.metadata.version("torch").split("+")[0]


def test_torch_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # another test may have imported it
    assert torch_build() is None
    with pytest.raises(UserError, match="is not installed for this interpreter"):
        launch_backend(None, 1, None, gpus=0)


@pytest.mark.parametrize(("note", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda = None", None)])
def test_both_spellings_of_torch_builds(
    note: str, cuda: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\n{note}\nhip = None\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    assert torch_build() == TorchBuild("2.11.0", cuda)


@pytest.mark.parametrize(
    ("chosen", "visible"),
    [(None, 4), ("", 0), ("0", 1), ("3,1", 2), ("0,7,1", 1), ("-1", 0), ("NoDevFiles", 0), ("GPU-5f,GPU-6a", 2)],
)
def test_visible_gpus_follow_the_rules_of_cuda(
    chosen: str | None, visible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "present_gpus", lambda: 4)
    assert visible_gpus({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == visible


@pytest.mark.gpu
def test_present_gpus_are_those_that_torch_sees() -> None:
    build = torch_build()
    if build is None or build.cuda is None or "CUDA_VISIBLE_DEVICES" in os.environ:
        pytest.skip("needs a CUDA build of PyTorch and all devices visible")
    torch = pytest.importorskip("torch")
    assert environment.present_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("requested", "build", "gpus", "backend"),
    [
        (None, CUDA_BUILD, 4, "nccl"),
        (None, CUDA_BUILD, 0, "gloo"),
        (None, CPU_BUILD, 0, "gloo"),
        (None, CPU_BUILD, 4, "gloo"),
        ("gloo", CUDA_BUILD, 1, "gloo"),
        ("nccl", CUDA_BUILD, 8, "nccl"),
    ],
)
def test_backend_choice(requested: str | None, build: TorchBuild, gpus: int, backend: str) -> None:
    assert launch_backend(requested, 4, build, gpus)[0] == backend


@pytest.mark.parametrize(
    ("requested", "build", "gpus", "expected"),
    [
        (None, CUDA_BUILD, 1, "NGPU=4 but 1 GPU visible"),
        ("nccl", CUDA_BUILD, 2, "NGPU=4 but 2 GPUs visible"),
        ("nccl", CUDA_BUILD, 0, "none is visible"),
        ("nccl", CPU_BUILD, 0, "none is visible"),
        ("nccl", CPU_BUILD, 4, "built without CUDA"),
        ("nvshmem", CPU_BUILD, 4, "built without CUDA"),
        ("nvshmem", CUDA_BUILD, 0, "none is visible here"),
        ("nccl-symm", CUDA_BUILD, 4, "does not offer NCCL's symmetric memory"),
        ("nccll", CUDA_BUILD, 4, "did you mean: nccl"),
    ],
)
def test_a_backend_that_cannot_be_had_is_refused(
    requested: str | None, build: TorchBuild, gpus: int, expected: str
) -> None:
    with pytest.raises(UserError) as refusal:
        launch_backend(requested, 4, build, gpus)
    assert expected in refusal.value.report


def test_ranks_share_the_cores() -> None:
    extra = rank_environment({}, LaunchRequest(ranks=2))
    assert int(extra["OMP_NUM_THREADS"]) == max(1, usable_cores() // 2)
    assert rank_environment({}, LaunchRequest(ranks=10_000))["OMP_NUM_THREADS"] == "1"
    bound = network.loopback_variables({})
    assert set(bound) == {*INTERFACE_VARIABLES}
    assert {*bound.values()} <= {"lo", "lo0"}


def test_what_the_caller_set_stays() -> None:
    set_by_caller = {"OMP_NUM_THREADS": "7", **dict.fromkeys(INTERFACE_VARIABLES, "eth0")}
    assert rank_environment(set_by_caller, LaunchRequest(ranks=2)) == {}
    assert network.loopback_variables(set_by_caller) == {}
    del set_by_caller["NCCL_SOCKET_IFNAME"]
    assert set(network.loopback_variables(set_by_caller)) == {"NCCL_SOCKET_IFNAME"}


def test_several_machines_listen_where_their_libraries_choose() -> None:
    assert network.loopback_variables({}, machines=2) == {}


def test_where_a_run_listens_is_reported() -> None:
    names = " = ".join((*INTERFACE_VARIABLES, str(network.loopback_interface())))
    assert network.format_ports({}, 1) == f"the store on 127.0.0.1; {names}"
    message = network.format_ports({"GLOO_SOCKET_IFNAME": "eth0"}, 1)
    assert message.endswith("GLOO_SOCKET_IFNAME = eth0, as you set it")
    assert "GLOO_SOCKET_IFNAME = lo" not in message
    assert "network must be closed" in network.format_ports({}, 4)


def test_the_loopback_interface_is_known_by_its_flags_and_without_them_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert network.loopback_interface() in ("lo", "lo0")
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "none0"), (2, "lo0")])
    assert network.loopback_interface() == "lo0"  # not in /sys of this machine
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "none0")])
    assert network.loopback_variables({}) == {}
    assert "no loopback interface was found" in network.format_ports({}, 1)


@pytest.mark.parametrize(("machines", "bound"), [(1, True), (2, False)])
def test_the_launcher_binds_ranks_to_the_loopback_on_one_machine_alone(
    machines: int, bound: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Mapping[str, str]] = []
    monkeypatch.setattr(supervisor, "supervise", lambda request, argv, environ, seconds: started.append(environ) or 0)
    environ = {"NGPU": "1", "COMM_BACKEND": "gloo", "NNODES": str(machines), "NODE_RANK": str(machines - 1)}
    environ |= {"RDZV_ENDPOINT": "first:29500"} if machines > 1 else {}
    argv = ["--job.config_file", str(ROOT / "configs/debug/debug.toml"), f"--job.dump_folder={tmp_path}"]
    assert supervisor.main(argv, environ) == 0
    assert ({*INTERFACE_VARIABLES} <= started[0].keys()) == bound


@pytest.mark.parametrize(
    ("variable", "value", "gpus", "refused"),
    [
        ("GLOO_SOCKET_IFNAME", "eth9", 0, True),
        ("GLOO_SOCKET_IFNAME", "wire", 0, True),  # gloo takes whole names
        ("GLOO_SOCKET_IFNAME", "wire0,lo", 0, False),
        ("GLOO_SOCKET_IFNAME", "wire0,eth9", 0, True),
        ("NCCL_SOCKET_IFNAME", "eth9", 8, True),
        ("NCCL_SOCKET_IFNAME", "eth9", 0, False),  # no GPU, no NCCL
        ("NCCL_SOCKET_IFNAME", "eth,wire", 8, False),
        ("NCCL_SOCKET_IFNAME", "^docker", 8, False),
        ("NCCL_SOCKET_IFNAME", "=wire", 8, True),
        ("NCCL_SOCKET_IFNAME", "=wire0", 8, False),
    ],
)
def test_a_network_interface_exists(
    variable: str, value: str, gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.socket, "if_nameindex", lambda: [(1, "lo"), (2, "wire0")])
    monkeypatch.setattr(environment, "visible_gpus", lambda environ: gpus)
    _, problems = read_launch_request({variable: value})
    assert [(one.where, one.value, one.allowed) for one in problems] == [(variable, value, "lo, wire0")] * refused
