"""The configuration: a TOML file with its base, environment variables, a pipeline's CSV file, a user's device."""

from __future__ import annotations

import os
from pathlib import Path

from fuzzing import Reader

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.errors import UserError
from quadriga.hardware import device_named
from quadriga.launch.environment import read_launch_request
from quadriga.launch.supervisor import main
from quadriga.models.registry import catalogue
from quadriga.train.__main__ import invalid_variables

RUN = """\
[job]
dump_folder = "out"
description = "a run"

[model]
flavor = "debugmodel"
n_layers = 4
rope_theta = 10000.0

[training]
local_batch_size = 4
seq_len = 128
steps = 10

[parallelism]
data_parallel_shard_degree = -1
module_fqns_per_model_part = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[quantize.linear.float8]
filter_fqns = ["output"]

[checkpoint]
enable = true
folder = "checkpoint"
"""
SHORT = RUN.partition("[parallelism]")[0]
TOKENS = [b"1000000000", b"0x" + b"f" * 5000, b"nan", b"-inf", b"1e999", b'"""', b"'''", b"[[", b"]]", b"a." * 5000]
TOKENS += [b'extends = "run.toml"\n', b'extends = "/dev/zero"\n', b"$HOME", b"${", b"~x", b"1979-05-27T07:32:00Z"]


def dry_run(folder: Path, *keys: str, ranks: str = "1") -> int:
    here = Path.cwd()
    os.chdir(folder)
    try:
        return main([*keys], {"CONFIG_FILE": "run.toml", "NGPU": ranks, "DRY_RUN": "1", "HOME": "/home/somebody"})
    finally:
        os.chdir(here)


def build_toml(folder: Path) -> None:
    (folder / "run.toml").write_text(SHORT)


def read_toml(folder: Path) -> int:
    return dry_run(folder)


def build_extends(folder: Path) -> None:
    (folder / "run.toml").write_text('extends = "base.toml"\n\n[training]\nsteps = 5\n')
    (folder / "base.toml").write_text('extends = "more/first.toml"\n' + SHORT)
    (folder / "more").mkdir()
    (folder / "more" / "first.toml").write_text("[training]\nlocal_batch_size = 2\n")


def build_long(folder: Path) -> None:
    (folder / "run.toml").write_text(RUN.replace("[parallelism]\n", "[parallelism]\n"))


def read_only(folder: Path) -> None:
    """Reading and checking alone, which is quick: no estimate is made."""
    known = {"catalogue": catalogue(), "backends": BACKENDS, "world_size": 1, "training": False}
    read(["--job.config_file", str(folder / "run.toml")], {}, **known)


def build_csv(folder: Path) -> None:
    (folder / "run.toml").write_text(SHORT)
    (folder / "order.csv").write_text("0F0,0F1,0F2,0F3,,0B0,0B1,0B2,0B3\n,1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n")


def read_csv(folder: Path) -> int:
    keys = "--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule_csv=order.csv"
    return dry_run(folder, *keys, ranks="2")


def build_device(folder: Path) -> None:
    figures = "memory = 141\nfp32 = 67\nbf16 = 989.4\nmemory_bandwidth = 4800\nlink_bandwidth = 450\n"
    (folder / "device.toml").write_text(f'name = "mine"\nlink = "a cable"\n{figures}')


def read_device(folder: Path) -> None:
    device_named(str(folder / "device.toml"), "estimate.device")


def build_environment(folder: Path) -> None:
    lines = ["NGPU=8", "NNODES=2", "NODE_RANK=1", "RDZV_ENDPOINT=node0:29500", "LOG_RANK=0,15", "MAX_RESTARTS=3"]
    lines += ["DRY_RUN=0", "RANK=3", "WORLD_SIZE=16", "LOCAL_RANK=3", "MASTER_PORT=29500", "COMM_BACKEND=gloo"]
    (folder / "environment").write_text("\n".join(lines))


def read_environment(folder: Path) -> None:
    """As the launcher and a rank read it: a variable holds what a process can be given, bytes without a null."""
    content = (folder / "environment").read_bytes().replace(b"\0", b"")
    pairs = [line.partition(b"=") for line in content.split(b"\n")]
    environ = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name}
    request, problems = read_launch_request(environ)
    problems += invalid_variables(environ)
    known = {"catalogue": catalogue(), "backends": BACKENDS, "world_size": request.world_size, "training": False}
    try:
        read([], environ, **known)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)


READERS = [
    Reader("configuration", build_toml, read_toml, tokens=TOKENS),
    Reader("configuration, long", build_long, read_only, tokens=TOKENS),
    Reader("extends", build_extends, read_only, tokens=TOKENS),
    Reader(
        "pipeline csv",
        build_csv,
        read_csv,
        tokens=[b"0F0", b"999999999F0", b"(0F0;0B0)OVERLAP_F_B"],
        damages=("*.csv",),
    ),
    Reader("device", build_device, read_device, tokens=TOKENS),
    Reader("environment", build_environment, read_environment, tokens=[b"9" * 5000, b":99999", b"1e3", b"\xff", b"_1"]),
]
