"""Parts of a card that are similar for every run: parallelisms, troubleshooting."""

from __future__ import annotations

from quadriga.config.markdown import code
from quadriga.config.read import Run

MEANINGS = (
    (
        "data_parallel_replicate_degree",
        "replicas of the model that read different rows; gradients are summed over them (DDP, outer degree of HSDP)",
    ),
    (
        "data_parallel_shard_degree",
        "GPUs that share one copy of parameters, gradients and optimizer state and read different rows (FSDP)",
    ),
    ("tensor_parallel_degree", "GPUs that share each large matrix product"),
    ("pipeline_parallel_degree", "GPUs that hold different layers; micro-batches pass through them in order"),
    ("context_parallel_degree", "GPUs that share each sequence"),
)


def memory_help(run: Run) -> str:
    """Remedies for an out-of-memory error that this run does not use yet, the cheapest first."""
    config, ways = run.config, []
    training, recompute = config.training, config.activation_checkpoint
    if training.local_batch_size > 1:
        keep = f" --training.global_batch_size {run.spec.global_batch_size}"
        ways.append(f"`--training.local_batch_size 1{keep}` (the same global batch, in smaller micro-batches)")
    if recompute.mode != "full":
        ways.append("`--activation_checkpoint.mode full` (recompute every block)")
    if training.mixed_precision_param == "float32":
        ways.append("`--training.mixed_precision_param bfloat16` (half the activation memory; changes the numbers)")
    if not run.spec.reshard_after_forward:
        ways.append("`--parallelism.fsdp_reshard_after_forward always`")
    if config.parallelism.data_parallel_shard_degree == -1:
        ways.append("more GPUs: a larger NGPU shards the state further")
    ways.append(f"`--training.seq_len {max(training.seq_len // 2, 1)}` (shorter sequences; changes the training)")
    if not training.enable_cpu_offload:
        ways.append("`--training.enable_cpu_offload` (state in host memory; slow)")
    return f"- **Out of memory.** In this order: {'; '.join(ways)}."


def backend_help(run: Run) -> str:
    """Which backend is used, and how a hanging collective is found."""
    comm, folder = run.config.comm, run.spec.folders.comm_traces
    traces = f"; each rank then writes its last collectives to {code(f'{folder}/')}" if comm.trace_buf_size else ""
    return (
        "- **Communication backend.** The default is nccl with CUDA and gloo without, and the choice is printed at the "
        "start. `COMM_BACKEND=gloo` runs on CPUs. A backend that is not available stops the run before it starts. "
        f"A collective times out after {comm.init_timeout_seconds} s in the first step, and after "
        f"{comm.train_timeout_seconds} s in later ones{traces}."
    )


def assets_help(run: Run) -> str:
    """The assets that the run needs, and how to download them."""
    model, training = run.config.model, run.config.training
    if model.hf_assets_path == "builtin:bytes":
        tokenizer = "The tokenizer is built in."
    else:
        tokenizer = (
            f"The tokenizer is read from {code(model.hf_assets_path)}. `python scripts/download_hf_assets.py` "
            "downloads it to `./assets/hf/Llama-3.1-8B` (accept the licence on the model's page first; set HF_TOKEN)."
        )
    if training.dataset_path is not None:
        data = f"The data is read from {code(training.dataset_path)}."
    elif training.dataset == "c4":
        data = (
            "The data is streamed from the Hub. Without a network, set `--training.dataset_path` to a folder of C4's "
            "`*.json.gz` shards."
        )
    else:
        data = "The data is built in."
    return f"- **Missing assets.** {tokenizer} {data}"
