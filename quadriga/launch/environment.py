"""The launch request in environment variables, and the devices of this machine. No torch: its import takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quadriga.comm.backend import BACKENDS, NCCL_SYMMETRIC, NVSHMEM, Machine, choose_backend
from quadriga.comm.network import INTERFACE_VARIABLES
from quadriga.errors import Problem, UserError, nearest
from quadriga.limits import COUNT, DEGREE
from quadriga.log import logging_ranks

YES, NO = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
DEFAULT_RANKS = 4
LOOPBACK_RENDEZVOUS = "quadriga-loopback"  # the name by which torchrun knows the rendezvous of `launch.agent`
FSDP_SOURCE, SYMMETRIC_CLASS = "distributed/fsdp/_fully_shard/_fsdp_collectives.py", "SymmMemAllGather"


@dataclass(frozen=True)
class LaunchRequest:
    """The launch that the variables request: `ranks` on each of `nodes` machines, of which this is number `node`.

    `restarts`: how often the ranks are started again after a failure.
    """

    ranks: int
    nodes: int = 1
    node: int = 0
    endpoint: str | None = None
    dry_run: bool = False
    restarts: int = 0

    @property
    def world_size(self) -> int:
        return self.ranks * self.nodes


def read_launch_request(environ: Mapping[str, str]) -> tuple[LaunchRequest, list[Problem]]:
    """Read NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT, MAX_RESTARTS, LOG_RANK, DRY_RUN. Wrong values become defaults, and
    a problem each."""
    problems: list[Problem] = []
    ranks = _read_number(environ, "NGPU", DEFAULT_RANKS, (1, DEGREE), problems)
    nodes = _read_number(environ, "NNODES", 1, (1, DEGREE), problems)
    node = _read_number(environ, "NODE_RANK", 0, (0, DEGREE), problems)
    restarts = _read_number(environ, "MAX_RESTARTS", 0, (0, COUNT), problems)
    dry_run = _read_switch(environ, "DRY_RUN", problems)
    endpoint = environ.get("RDZV_ENDPOINT") or None
    if nodes > 1:
        problems += _node_problems(environ, nodes, node, dry_run)
    elif node > 0:
        fix = "set NNODES to the number of machines, or unset NODE_RANK"
        what = "NNODES is not set, so this machine would train alone"
        problems.append(Problem("NODE_RANK", what, str(node), "environment", fix=fix))
    if ranks * nodes > DEGREE and not problems:
        what = f"{ranks} ranks on each of {nodes} machines are too many"
        problems.append(Problem("NGPU, NNODES", what, source="environment", allowed=f"at most {DEGREE} in all"))
        ranks = nodes = 1
    problems += [*_log_rank_problems(environ, ranks * nodes), *_interface_problems(environ)]
    return LaunchRequest(ranks, nodes, node, endpoint, dry_run, restarts), problems


def _read_number(
    environ: Mapping[str, str], name: str, default: int, bounds: tuple[int, int], problems: list[Problem]
) -> int:
    text, (least, most) = environ.get(name, "").strip(), bounds
    if not text:
        return default
    if (number := parse_whole_number(text)) is not None and least <= number <= most:
        return number
    what, allowed = "not a number in the range of this variable", f"{least} to {most}"
    problems.append(Problem(name, what, text, "environment", allowed))
    return default


def parse_whole_number(text: str) -> int | None:
    """The whole number that `text` is; None if it is none, or has more than 15 digits."""
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _read_switch(environ: Mapping[str, str], name: str, problems: list[Problem]) -> bool:
    text = environ.get(name, "").strip().lower()
    if text not in YES | NO:
        problems.append(Problem(name, "neither on nor off", text, "environment", "1 or 0"))
    return text in YES


def _node_problems(environ: Mapping[str, str], nodes: int, node: int, dry_run: bool) -> list[Problem]:
    """A dry run needs neither variable, but refuses the values that a start refuses."""
    problems = []
    if not environ.get("NODE_RANK", "").strip() and not dry_run:
        fix = f"set NODE_RANK=0 on the first machine, up to {nodes - 1} on the last (under Slurm: $SLURM_NODEID)"
        problems.append(Problem("NODE_RANK", f"is not set, but NNODES={nodes}", fix=fix))
    elif node >= nodes:
        allowed = f"0 to {nodes - 1}"
        problems.append(Problem("NODE_RANK", f"there are {nodes} machines", str(node), "environment", allowed))
    endpoint = environ.get("RDZV_ENDPOINT", "")
    host, _, port = endpoint.rpartition(":")
    valid = re.fullmatch(r"[\w.-]+|\[[\w.:%-]+\]", host, re.ASCII) and 0 < (parse_whole_number(port) or 0) < 65536
    if not valid and (endpoint or not dry_run):
        what = "must name the first machine and a free port on it, equal on all machines"
        fix = "for example RDZV_ENDPOINT=node0:29500"
        problems.append(
            Problem(
                "RDZV_ENDPOINT", what, endpoint or None, "environment", "host:port, the port from 1 to 65535", fix=fix
            )
        )
    return problems


def _log_rank_problems(environ: Mapping[str, str], world_size: int) -> list[Problem]:
    text = environ.get("LOG_RANK", "")
    allowed = f"ranks from 0 to {world_size - 1}, separated by commas"
    try:
        unknown = sorted(rank for rank in logging_ranks(environ) if not 0 <= rank < world_size)
    except ValueError:
        return [Problem("LOG_RANK", "not a list of ranks", text, "environment", allowed)]
    if unknown:
        return [Problem("LOG_RANK", f"this run has {world_size} ranks", text, "environment", allowed)]
    return []


def _interface_problems(environ: Mapping[str, str]) -> list[Problem]:
    """Gloo takes names; NCCL and NVSHMEM take beginnings of names, `=` before exact ones and `^` before excluded ones.
    Only GPUs use the last two."""
    here = [name for _, name in socket.if_nameindex()]
    problems = []
    for variable in INTERFACE_VARIABLES:
        text, gloo = environ.get(variable, ""), variable.startswith("GLOO")
        exact, asked = gloo or text.startswith("="), text.removeprefix("" if gloo else "=").split(",")
        fit = [name in here if exact else any(one.startswith(name) for one in here) for name in asked]
        if not text or (all(fit) if gloo else any(fit) or text.startswith("^") or not visible_gpus(environ)):
            continue
        what = "this machine has no such network interface"
        problems.append(Problem(variable, what, text, "environment", ", ".join(here), nearest(text, here)))
    return problems


@dataclass(frozen=True)
class TorchBuild:
    """The PyTorch of this interpreter. `cuda`: the CUDA version that it was built for, None for a CPU build.
    `fsdp_symmetric`: whether its FSDP can place buffers in symmetric memory."""

    version: str
    cuda: str | None
    fsdp_symmetric: bool = False

    @property
    def offers(self) -> dict[str, bool]:
        """As in `Machine`. Only a process that has imported torch knows whether a CUDA build has NVSHMEM."""
        return {NCCL_SYMMETRIC: self.fsdp_symmetric} | ({} if self.cuda else {NVSHMEM: False})


def torch_build() -> TorchBuild | None:
    """Read from PyTorch's `version.py`, without importing torch. None: it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    note = (folder / "version.py").read_text()
    found = {name: re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", note, re.MULTILINE) for name in ("__version__", "cuda")}
    version, cuda = (match.group(1) if match else None for match in found.values())
    return TorchBuild(version or "unknown", cuda, _fsdp_is_symmetric(folder))


def _fsdp_is_symmetric(folder: Path) -> bool:
    """Looked up in the source of FSDP2, because versions differ."""
    try:
        return f"class {SYMMETRIC_CLASS}(" in (folder / FSDP_SOURCE).read_text(encoding="utf-8")
    except OSError:
        return False


def visible_gpus(environ: Mapping[str, str]) -> int:
    """The number of NVIDIA devices that a child process would see, with CUDA_VISIBLE_DEVICES applied."""
    present = present_gpus()
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or present == 0:
        return present
    count = 0
    for entry in chosen.split(","):
        name = entry.strip()
        number = parse_whole_number(name)
        if not name.startswith(("GPU-", "MIG-")) and not (number is not None and number < present):
            break  # CUDA ignores an invalid entry and all entries after it
        count += 1
    return count


def present_gpus() -> int:
    """The number of NVIDIA devices of this machine, from the driver's library (NVML), else from its device files."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return sum(1 for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)) if os.path.isdir("/dev") else 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    finally:
        nvml.nvmlShutdown()


def usable_cores() -> int:
    """The number of cores that this process may use, with the quota of a container (cgroup v2) applied."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def launch_backend(requested: str | None, ranks: int, build: TorchBuild | None, gpus: int) -> tuple[str, str]:
    """The backend of a training run on this machine, and the reason in a few words.

    Raises:
        UserError: PyTorch is missing, the backend is not available here, or there are fewer devices than ranks.
    """
    if build is None:
        fix = "pip install -r requirements.txt (or name another interpreter: PYTHON=/path/to/python ./run_train.sh)"
        raise UserError(Problem("PyTorch", "is not installed for this interpreter", fix=fix))
    asked = BACKENDS.get(requested or "")
    if asked is not None and asked.device_type == "cuda" and gpus and build.cuda is None:
        fix = "install a build of PyTorch with CUDA, or choose gloo to train on the CPU"
        raise UserError(Problem("comm.backend", f"PyTorch {build.version} is built without CUDA", requested, fix=fix))
    backend = choose_backend(requested, Machine(gpus > 0 and build.cuda is not None, build.version, build.offers))
    if BACKENDS[backend].device_type == "cuda" and gpus < ranks:
        fix = f"set NGPU={gpus}, or COMM_BACKEND=gloo to rehearse on the CPU"
        raise UserError(Problem("NGPU", f"NGPU={ranks} but {gpus} GPU{'s' * (gpus != 1)} visible", fix=fix))
    if requested:
        return backend, "as requested"
    if backend == "nccl":
        return backend, f"{gpus} CUDA device{'s' * (gpus != 1)} visible"
    if gpus:
        return backend, f"{gpus} GPU{'s' * (gpus != 1)} visible, but PyTorch {build.version} is built without CUDA"
    return backend, "no CUDA device is visible"


def rank_environment(environ: Mapping[str, str], request: LaunchRequest) -> dict[str, str]:
    """Variables for the ranks of this machine that the caller did not set."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // request.ranks))}
