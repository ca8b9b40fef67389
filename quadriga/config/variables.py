"""The environment variables that a user may set: name, value if unset, meaning. Values and meanings are Markdown.

The cards of configurations have all of them, and `./run_train.sh --help` those of a launch. A test compares the table
with `run_train.sh` and with the variables that the code reads.
"""

from __future__ import annotations

LAUNCH_VARIABLES = (
    ("CONFIG_FILE", "`configs/debug/debug.toml`", "the TOML file, for `run_train.sh`"),
    ("NGPU", "4", "ranks on this machine"),
    (
        "COMM_BACKEND",
        "nccl with CUDA, else gloo",
        "gloo, nccl, nccl-symm or nvshmem; overrides `comm.backend` of the file",
    ),
    ("LOG_RANK", "0", "ranks that print progress, such as `0,1`"),
    ("MAX_RESTARTS", "0", "how often failed ranks are started again; they resume from the newest checkpoint"),
    ("DRY_RUN", "0", "1: check everything, print what the run would be, start nothing"),
    ("NNODES", "1", "machines"),
    ("NODE_RANK", "0", "number of this machine, from 0"),
    ("RDZV_ENDPOINT", "none", "host and port of the first machine, for several machines"),
    ("PYTHON", "that of the active environment, that of `.venv`, or `python3`", "interpreter of `run_train.sh`"),
)
VARIABLES = (
    *LAUNCH_VARIABLES,
    ("NVSHMEM_SYMMETRIC_SIZE", "what the run needs", "size of NVSHMEM's heap per GPU, for `COMM_BACKEND=nvshmem`"),
    ("PYTORCH_ALLOC_CONF", "`expandable_segments:True`", "options of PyTorch's CUDA allocator"),
    ("CUDA_VISIBLE_DEVICES", "all", "GPUs that the run may use"),
    ("OMP_NUM_THREADS", "cores / ranks", "threads of each rank on the CPU"),
    ("TORCHINDUCTOR_CACHE_DIR", "`quadriga-compile` in the user's cache folder", "cache of compiled code"),
    ("XDG_CACHE_HOME", "`~/.cache`", "the user's cache folder"),
    ("HF_TOKEN", "none", "access token of the Hugging Face Hub, for gated repositories"),
    ("HF_ENDPOINT", "`https://huggingface.co`", "address of the Hub or of a mirror"),
    ("WANDB_PROJECT", "Weights & Biases' own", "the project, with `metrics.enable_wandb`"),
    ("WANDB_MODE", "Weights & Biases' own", "`offline`: nothing is sent"),
)


def variables_help() -> str:
    """The variables of a launch, one per line, for `--help`."""
    lines = (f"  {name:<15} {meaning} (default: {unset})" for name, unset, meaning in LAUNCH_VARIABLES)
    return "\n".join(lines).replace("`", "")
