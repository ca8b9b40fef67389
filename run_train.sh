#!/usr/bin/env bash
# Train from one TOML file, from any folder, without installing anything but requirements.txt.
#
#   CONFIG_FILE=configs/llama3_8b/llama3_8b.toml NGPU=4 ./run_train.sh --training.steps 20
#
# NGPU           ranks on this machine (default 4)
# CONFIG_FILE    the TOML file, relative to the caller's folder (default: the debug configuration)
# COMM_BACKEND   gloo, nccl, nccl-symm or nvshmem (default: nccl where CUDA is, else gloo; the choice is printed)
# LOG_RANK       ranks that print progress, e.g. 0,1 (default 0)
# MAX_RESTARTS   how often the ranks are started again when one fails, to go on from the newest checkpoint (default 0)
# DRY_RUN        1: say what the run would be and exit; needs no GPU
# NNODES, NODE_RANK, RDZV_ENDPOINT
#                several machines: how many, which one this is (from 0), and host:port of machine 0
#                On one machine every port is opened on the loopback, unless you set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#                or NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME; several machines need a closed network (SECURITY.md).
# PYTHON         the interpreter (default: the active environment's, else ./.venv here, else python3)
#
# Further arguments are passed on as they are: --section.key value.
#
# Signals to this process reach the run: SIGTERM, SIGINT, SIGUSR1 and SIGHUP save and leave with exit code 75, SIGUSR2
# saves and goes on. `./run_train.sh --help` lists all exit codes, docs/operations.md what to do about each.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -n "${PYTHON:-}" ]]; then
    python="$PYTHON"
elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
    python="$CONDA_PREFIX/bin/python"
elif [[ -x "$repo/.venv/bin/python" ]]; then
    python="$repo/.venv/bin/python"
else
    python=python3
fi

export NGPU="${NGPU:-4}"
export CONFIG_FILE="${CONFIG_FILE:-$repo/configs/debug/debug.toml}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # a file of the caller's folder must not stand in for a module of ours or of Python

exec "$python" -m quadriga.launch "$@"
