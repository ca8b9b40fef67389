"""What a card explains whatever the run: parallelisms, variables, and what to do when something goes wrong."""

from __future__ import annotations

from quadriga.config.markdown import code
from quadriga.config.read import Run

MEANINGS = (
    (
        "data_parallel_replicate_degree",
        "copies of the model that read different rows; gradients are summed over them (DDP, outer degree of HSDP)",
    ),
    (
        "data_parallel_shard_degree",
        "GPUs that share one copy of parameters, gradients and optimizer state and read different rows (FSDP)",
    ),
    ("tensor_parallel_degree", "GPUs that share each large matrix product"),
    ("pipeline_parallel_degree", "GPUs that hold different layers; micro-batches stream through them"),
    ("context_parallel_degree", "GPUs that share each sequence"),
)

ENVIRONMENT = (
    ("`CONFIG_FILE`", "`configs/debug/debug.toml`", "the TOML file, for `run_train.sh`"),
    ("`NGPU`", "4", "ranks on this machine"),
    ("`COMM_BACKEND`", "nccl with CUDA, else gloo", "communication backend; stands above `comm.backend` of the file"),
    ("`NVSHMEM_SYMMETRIC_SIZE`", "what the run needs", "NVSHMEM's heap on each GPU, with `COMM_BACKEND=nvshmem`"),
    ("`LOG_RANK`", "0", "ranks that print progress, as `0,1`"),
    ("`DRY_RUN`", "0", "1: check everything, say what the run would be, start nothing"),
    ("`NNODES`", "1", "machines"),
    ("`NODE_RANK`", "0", "number of this machine, from 0"),
    ("`RDZV_ENDPOINT`", "none", "host and port of the first machine, where there are several"),
    ("`PYTHON`", "the active environment's, `.venv`'s, or `python3`", "interpreter of `run_train.sh`"),
    ("`PYTORCH_ALLOC_CONF`", "`expandable_segments:True`", "options of PyTorch's CUDA allocator"),
    ("`CUDA_VISIBLE_DEVICES`", "all", "GPUs that the run may use"),
    ("`OMP_NUM_THREADS`", "cores / ranks", "threads of each rank on the CPU"),
    ("`HF_TOKEN`", "none", "access token of the Hugging Face Hub, for gated repositories"),
    ("`HF_ENDPOINT`", "`https://huggingface.co`", "address of the Hub or of a mirror"),
    ("`WANDB_PROJECT`, `WANDB_MODE`", "Weights & Biases' own", "with `metrics.enable_wandb`: project; `offline`"),
)


def memory_help(run: Run) -> str:
    """Ways out of an out-of-memory error that this run has not taken yet, the cheapest first."""
    config, ways = run.config, []
    training, recompute = config.training, config.activation_checkpoint
    if training.local_batch_size > 1:
        keep = f" --training.global_batch_size {run.spec.global_batch_size}"
        ways.append(f"`--training.local_batch_size 1{keep}` (the same batch, in smaller pieces)")
    if recompute.mode != "full":
        ways.append("`--activation_checkpoint.mode full` (recompute every block)")
    if training.mixed_precision_param == "float32":
        ways.append("`--training.mixed_precision_param bfloat16` (half the activations; another run, numerically)")
    if not run.spec.reshard_after_forward:
        ways.append("`--parallelism.fsdp_reshard_after_forward always`")
    if config.parallelism.data_parallel_shard_degree == -1:
        ways.append("more GPUs: a larger NGPU shares the state further")
    ways.append(f"`--training.seq_len {max(training.seq_len // 2, 1)}` (shorter sequences; another run)")
    if not training.enable_cpu_offload:
        ways.append("`--training.enable_cpu_offload` (state in host memory; slow)")
    return f"- **Out of memory.** In this order: {'; '.join(ways)}."


def backend_help(run: Run) -> str:
    """What carries the bytes, and how a collective that hangs is found."""
    comm, folder = run.config.comm, run.spec.folders.comm_traces
    traces = f"; each rank then writes its last collectives to {code(f'{folder}/')}" if comm.trace_buf_size else ""
    return (
        "- **Communication backend.** nccl is taken where CUDA is, gloo where it is not, and the choice is printed at "
        "the start. `COMM_BACKEND=gloo` rehearses on CPUs; a backend that cannot be had stops the run before it "
        f"starts. A collective that hangs is given up after {comm.init_timeout_seconds} s before the first step is "
        f"done and {comm.train_timeout_seconds} s after it{traces}."
    )


def assets_help(run: Run) -> str:
    """What must be there before the run, and how to get it."""
    model, training = run.config.model, run.config.training
    if model.hf_assets_path == "builtin:bytes":
        tokenizer = "The tokenizer is built in."
    else:
        tokenizer = (
            f"The tokenizer is looked for in {code(model.hf_assets_path)}; `python scripts/download_hf_assets.py` "
            "fetches it into `./assets/hf/Llama-3.1-8B` (accept the licence on the model's page first; set HF_TOKEN)."
        )
    if training.dataset_path is not None:
        data = f"The data is read from {code(training.dataset_path)}."
    elif training.dataset == "c4":
        data = (
            "The data is streamed from the Hub; without a network, set `--training.dataset_path` to a folder of C4's "
            "`*.json.gz` shards."
        )
    else:
        data = "The data is built in."
    return f"- **Missing assets.** {tokenizer} {data}"
