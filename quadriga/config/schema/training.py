"""[training] and [validation], each with its nested [*.dataloader]: data, batches, steps and number formats."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import AllOrCount, Amount, Count, Name, NonNegative, Overlap, Section


class Fetching(Section):
    """How batches are made of documents and fetched ahead: `validation.dataloader`, whose documents stay in order."""

    num_workers: Amount = 0
    """Threads that read and tokenize ahead of training, at most one a row of the batch; 0 is one too."""

    persistent_workers: bool = False
    """Without effect: the threads always live as long as the run."""

    pin_memory: bool = False
    """Place batches in page-locked memory, from which copies to a GPU are faster."""

    prefetch_factor: Count | None = None
    """Batches held ready; none is 2."""

    on_bad_record: Literal["stop", "skip"] = "stop"
    """A document that cannot be read (no JSON, no such field, not UTF-8, too long) ends the run, or is left out."""

    window_overlap: Overlap = 1
    """Ids that a window of `seq_len` + 1 shares with the next: 1 makes each token a label once; 0 is torchtitan's."""


class Dataloader(Fetching):
    """How documents are ordered, made into batches and fetched ahead of training."""

    shuffle: bool = True
    """Mix the documents by seed and epoch; false reads them in the data's own order, as torchtitan does."""


class Training(Section):
    """Data, batch, length of the run and number formats."""

    dataset: Name = "builtin"
    """What to read: `builtin`, `c4`, or local files as `text`, `jsonl`, `parquet` (with `dataset_path`)."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files; for `c4` a folder of its `*.json.gz` shards instead of the Hub."""

    dataset_text_field: Name = "text"
    """The field of JSON lines, or the column of Parquet files and of the Hub, that holds the documents."""

    local_batch_size: Count = 8
    """Sequences in one micro-batch of one data-parallel rank."""

    global_batch_size: AllOrCount = -1
    """Sequences in one optimizer step of the whole run; -1 is one micro-batch of every data-parallel rank."""

    seq_len: Count = 2048
    """Tokens in one sequence."""

    loss_chunks: Count = 1
    """Pieces that a micro-batch's tokens are cut into at the loss: logits exist for one piece at a time."""

    max_norm: NonNegative = 1.0
    """Clip gradients to this global norm; 0 switches clipping off."""

    steps: Count = 10000
    """Optimizer steps of the run."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Format in which parameters are held."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Format in which the model computes, on every layout alike."""

    mixed_precision_reduce: Literal["bfloat16", "float32", "float64"] = "float32"
    """Format in which gradients are summed over ranks; in `float64` data-parallel layouts agree to the bit."""

    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products: `highest` is float32, `high` allows TF32, `medium` allows bfloat16."""

    gc_freq: Count = 50
    """Steps between two collections of Python's garbage, which otherwise waits, so that ranks do not stall apart."""

    gc_debug: bool = False
    """Collect garbage with extra diagnostics."""

    dataloader: Dataloader = Dataloader()


class Validation(Section):
    """Loss on held-out data, weighted by tokens."""

    enable: bool = False
    """Run the validation loop, at step 1 and then every `freq` steps."""

    dataset: Name = "c4_validation"
    """What to read: `c4_validation`, `builtin_validation`, or local files as `text`, `jsonl`, `parquet`."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files."""

    dataset_text_field: Name | None = None
    """The field or column that holds the documents; none is that of `training`."""

    local_batch_size: Count = 8
    """Sequences in one validation batch of one data-parallel rank."""

    seq_len: Count = 2048
    """Tokens in one validation sequence."""

    freq: Count = 10
    """Steps between two validations."""

    steps: AllOrCount = -1
    """Batches of one validation; -1 is the whole set."""

    dataloader: Fetching = Fetching()
