"""[training] and [validation], each with its nested [*.dataloader]: data, batches, steps and formats."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quadriga.config.schema.section import AllOrCount, Amount, Count, Name, NonNegative, Overlap, Section
from quadriga.config.schema.sources import (
    NAME_FORM,
    TOKENS,
    DataSource,
    MixtureStage,
    SourceName,
    TextKeys,
    TokenFormat,
    TokenKeys,
    TokenType,
    TrainingSource,
    title_of,
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


class Training(DataSource):
    """Data, batch, length of the run, and formats."""

    dataset: Name = "builtin"
    """The data: `builtin`, `c4`, `hub`, or by `dataset_path` `text`, `jsonl`, `parquet`, `arrow`, `tokens`."""

    dataset_path: str | None = None
    """A file, a folder or a glob; for `hub` `org/name` or `org/name@revision`; for `c4` a folder of its shards."""

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

    packing: Literal["concat", "pad"] = "concat"
    """Rows of text: `concat` has documents end to end; `pad` has one record, cut at `seq_len` and filled up."""

    document_mask: bool = False
    """No token attends to another document of its row, and positions begin at 0 in each document."""

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
    def reads_text(self) -> bool:
        """Whether any data must be tokenized."""
        datasets = [source.dataset for source in self.sources] or [self.dataset]
        return any(dataset != TOKENS for dataset in datasets)

    @property
    def foreign_to_torchtitan(self) -> str | None:
        """What the data are, if torchtitan reads nothing like them."""
        if self.sources or self.dataset == TOKENS:
            return "a mixture" if self.sources else "token files"
        return "rows of one record" if self.packing == "pad" else None

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


class HeldOut(Section):
    """What names one held-out set. What is not set is that of `training`."""

    dataset: Name = "c4_validation"
    """The data: `c4_validation`, `builtin_validation`, or local `text`, `jsonl`, `parquet`, `arrow`, `tokens`."""

    dataset_path: str | None = None
    """A file, a folder or a glob of local files."""

    dataset_text_field: Name | None = None
    """The field or column that contains the documents or ids; none is that of `training`."""

    dataset_template: Name | None = None
    """As `training.dataset_template`; none is that of `training`, if `dataset_text_field` is not set here either."""

    dataset_prompt: Name | None = None
    """As `training.dataset_prompt`; none is that of `training`, if field and template are not set here either."""

    dataset_config: Name | None = None
    """The configuration of a data set of the Hub; none is that of `training`, if both have the same path."""

    dataset_split: Name | None = None
    """The split of a data set; none is `train`."""

    dataset_streaming: bool | None = None
    """Stream a data set of the Hub, or download it once; none is as in `training`."""

    token_format: TokenFormat | None = None
    """The format of `tokens`; none is that of `training`, with `token_dtype` if that is not set here."""

    token_dtype: TokenType | None = None
    """The integer type of `tokens` files without a header."""

    token_eos_id: Amount | None = None
    """The id that ends a document in `tokens`; none is that of `training`."""

    @property
    def title(self) -> str:
        """The name of the set in a report of several."""
        return title_of(self.dataset, self.dataset_path)

    @property
    def table(self) -> str:
        """The table of this set in messages."""
        return "validation"

    @property
    def label(self) -> str | None:
        """The name of the set in metrics; None for the one set of `validation.dataset`."""
        return None

    def text_keys(self, training: Training) -> TextKeys:
        """How texts are read. Without a field and a template, they are those of `training`."""
        field, template, config = self.dataset_text_field, self.dataset_template, self.dataset_config
        prompt = self.dataset_prompt
        if field is None and template is None:
            template, prompt = training.dataset_template, prompt or training.dataset_prompt
        if config is None and self.dataset_path == training.dataset_path:
            config = training.dataset_config
        streaming = training.dataset_streaming if self.dataset_streaming is None else self.dataset_streaming
        return TextKeys(
            self.dataset,
            self.dataset_path,
            self.table,
            training.dataset_text_field if field is None else field,
            template,
            config,
            self.dataset_split,
            streaming,
            prompt,
        )

    def token_keys(self, training: Training) -> TokenKeys:
        """How `tokens` are read. What is not set is that of `training`, if that reads `tokens` too."""
        inherited = (training if training.dataset == TOKENS else Training()).token_keys
        dtype, eos_id, field = self.token_dtype, self.token_eos_id, self.dataset_text_field
        if dtype is None and self.token_format is None:
            dtype = inherited.dtype
        return TokenKeys(
            self.table,
            self.dataset_path or "",
            self.token_format or inherited.format,
            dtype,
            inherited.eos_id if eos_id is None else eos_id,
            inherited.field if field is None else token_column(field),
        )


class ValidationSet(HeldOut):
    """One of several held-out sets, each with a loss of its own."""

    name: SourceName | None = Field(None, title=NAME_FORM)
    """The name in messages and metrics; none is the last part of the path without its suffix, or the data set."""

    dataset: Name
    """The data, as `validation.dataset`."""

    @property
    def title(self) -> str:
        return title_of(self.dataset, self.dataset_path) if self.name is None else self.name

    @property
    def table(self) -> str:
        return f"validation.sets[{self.title}]"

    @property
    def label(self) -> str | None:
        return self.title


class Validation(HeldOut):
    """Loss on held-out data, weighted by tokens."""

    enable: bool = False
    """Validate at step 1 and then every `freq` steps."""

    sets: tuple[ValidationSet, ...] = Field((), title="tables [[validation.sets]]")
    """Several held-out sets, instead of `dataset`: one table for each, with a loss of its own."""

    windows: AllOrCount = 64
    """Windows (sequences) of each set that a validation reads, from the beginning, on every layout; -1 is all."""

    steps: AllOrCount | None = None
    """As in torchtitan, instead of `windows`: batches of `local_batch_size` of each data-parallel rank; -1 is all."""

    freq: Count = 10
    """Steps between two validations."""

    seq_len: Count | None = None
    """Tokens in one validation sequence; none is `training.seq_len`."""

    local_batch_size: Count | None = None
    """Sequences in one validation batch of one data-parallel rank; none is `training.local_batch_size`."""

    dataloader: Fetching = Fetching()

    @property
    def read_sets(self) -> tuple[HeldOut, ...]:
        """The sets that are read: those of the tables, or the one of `dataset`."""
        return self.sets or (self,)
