"""[training] and [validation], each with its nested [*.dataloader]: data, batches, steps and formats."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quadriga.config.schema.section import AllOrCount, Amount, Count, Name, NonNegative, Overlap, Section
from quadriga.config.schema.sources import (
    TEXT_FIELD,
    TOKENS,
    MixtureStage,
    TokenFormat,
    TokenKeys,
    TokenType,
    TrainingSource,
    token_column,
)


class Fetching(Section):
    """Batches and prefetching of `validation.dataloader`. Documents are read in order."""

    num_workers: Amount = 0
    """Threads that read and tokenize ahead of training, at most one per row of the batch; 0 is one too."""

    persistent_workers: bool = False
    """Without effect: the threads always run until the run ends."""

    pin_memory: bool | None = None
    """Place batches in page-locked memory, which makes copies to a GPU faster; none: on if the run computes on CUDA."""

    prefetch_factor: Count | None = None
    """Batches that are prefetched; none is 2. A stall of the data costs nothing for so many steps."""

    on_bad_record: Literal["stop", "skip"] = "stop"
    """After a document that cannot be read (not JSON, no such field, not UTF-8, too long): stop the run, or skip it."""

    window_overlap: Overlap = 1
    """Ids that a window of `seq_len` + 1 shares with the next: 1 makes each token a label once; 0 is torchtitan's."""


class Dataloader(Fetching):
    """Order of documents, batches and prefetching."""

    shuffle: bool = True
    """Shuffle the documents by seed and epoch; false reads them in the order of the data, as torchtitan does."""


class Training(Section):
    """Data, batch, length of the run, and formats."""

    dataset: Name = "builtin"
    """The data: `builtin`, `c4`, or local files as `text`, `jsonl`, `parquet`, `tokens` (with `dataset_path`)."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files; for `c4` a folder of its `*.json.gz` shards instead of the Hub."""

    dataset_text_field: Name = TEXT_FIELD
    """The field of JSON lines, or the column of Parquet files and of the Hub, that contains the documents or ids."""

    token_format: TokenFormat = "auto"
    """The format of `tokens`; `auto` recognizes it by the content. `raw` are ids without a header."""

    token_dtype: TokenType | None = None
    """The integer type of `tokens` files without a header, which is never guessed. Other files state theirs."""

    token_eos_id: Amount | None = None
    """The id that ends a document in `tokens` files that have no index of documents."""

    sources: tuple[TrainingSource, ...] = Field((), title="tables [[training.sources]]")
    """A mixture of data sets, instead of `dataset`: one table for each source, with its share."""

    stages: tuple[MixtureStage, ...] = Field((), title="tables [[training.stages]]")
    """Other weights of the sources from a later step on: one table for each stage."""

    local_batch_size: Count = 8
    """Sequences in one micro-batch of one data-parallel rank."""

    global_batch_size: AllOrCount = -1
    """Sequences in one optimizer step of the whole run; -1 is one micro-batch of every data-parallel rank."""

    seq_len: Count = 2048
    """Tokens in one sequence."""

    loss_chunks: Count = 1
    """Number of chunks of a micro-batch's tokens at the loss. Logits exist for one chunk at a time."""

    max_norm: NonNegative = 1.0
    """Clip gradients to this global norm; 0 switches clipping off."""

    steps: Count = 10000
    """Optimizer steps of the run."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Format of the parameters."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Format of computation in the model, the same on every layout."""

    mixed_precision_reduce: Literal["bfloat16", "float32", "float64"] = "float32"
    """Format of the sum of gradients over ranks. With `float64`, data-parallel layouts agree bit for bit."""

    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products: `highest` is float32, `high` allows TF32, `medium` allows bfloat16."""

    gc_freq: Count = 50
    """Steps between two garbage collections of Python. All ranks collect in the same step, so none delays another."""

    gc_debug: bool = False
    """Collect garbage with additional diagnostics."""

    dataloader: Dataloader = Dataloader()

    @property
    def token_keys(self) -> TokenKeys:
        """How `tokens` are read."""
        path = self.dataset_path or ""  # which `assets.dataset_problem` refuses
        return TokenKeys(
            "training",
            path,
            self.token_format,
            self.token_dtype,
            self.token_eos_id,
            token_column(self.dataset_text_field),
        )

    @property
    def reads_text(self) -> bool:
        """Whether any data must be tokenized."""
        datasets = [source.dataset for source in self.sources] or [self.dataset]
        return any(dataset != TOKENS for dataset in datasets)

    @property
    def foreign_to_torchtitan(self) -> str | None:
        """What the data are, if torchtitan reads nothing like them."""
        return "a mixture" if self.sources else "token files" if self.dataset == TOKENS else None

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document in all token files; None if there is no such id, or several."""
        ids = {source.token_eos_id for source in self.sources if source.dataset == TOKENS} or {self.token_eos_id}
        return ids.pop() if len(ids) == 1 else None

    @property
    def computes_in_full_float32(self) -> bool:
        """Whether matrix products are in float32 at `highest`, so that they use none of a GPU's faster units."""
        return self.mixed_precision_param == "float32" and self.float32_matmul_precision == "highest"

    def uses_fsdp(self, ranks: int) -> bool:
        """Whether `fully_shard` wraps the model: if anything is sharded over the `ranks`, converted or offloaded.

        `ranks`: of the data-parallel, context and tensor axes. Tensor parallelism alone counts too: the gradients of
        norms are still `Partial`, and `fully_shard` over a mesh of one rank reduces them over the tp ranks, once per
        step if gradients are accumulated.
        """
        dtypes = {self.dtype, self.mixed_precision_param, self.mixed_precision_reduce}
        return ranks > 1 or len(dtypes) > 1 or self.enable_cpu_offload


class Validation(Section):
    """Loss on held-out data, weighted by tokens."""

    enable: bool = False
    """Validate at step 1 and then every `freq` steps."""

    dataset: Name = "c4_validation"
    """The data: `c4_validation`, `builtin_validation`, or local files as `text`, `jsonl`, `parquet`, `tokens`."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files."""

    dataset_text_field: Name | None = None
    """The field or column that contains the documents or ids; none is that of `training`."""

    token_format: TokenFormat | None = None
    """The format of `tokens`; none is that of `training`, with `token_dtype` if that is not set here."""

    token_dtype: TokenType | None = None
    """The integer type of `tokens` files without a header."""

    token_eos_id: Amount | None = None
    """The id that ends a document in `tokens`; none is that of `training`."""

    local_batch_size: Count = 8
    """Sequences in one validation batch of one data-parallel rank."""

    seq_len: Count = 2048
    """Tokens in one validation sequence."""

    freq: Count = 10
    """Steps between two validations."""

    steps: AllOrCount = -1
    """Batches per validation; -1 is the whole data set."""

    dataloader: Fetching = Fetching()

    def token_keys(self, training: Training) -> TokenKeys:
        """How `tokens` are read. What is not set is that of `training`, if that reads `tokens` too."""
        inherited = (training if training.dataset == TOKENS else Training()).token_keys
        dtype, eos_id, field = self.token_dtype, self.token_eos_id, self.dataset_text_field
        if dtype is None and self.token_format is None:
            dtype = inherited.dtype
        return TokenKeys(
            "validation",
            self.dataset_path or "",
            self.token_format or inherited.format,
            dtype,
            inherited.eos_id if eos_id is None else eos_id,
            inherited.field if field is None else token_column(field),
        )
