"""The resolved run: what follows from a configuration and the number of ranks. Made by `resolve`."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.config.model_spec import ModelSpec
from quadriga.config.pipeline_order import PipelineOrder


@dataclass(frozen=True)
class Degrees:
    """The degree of parallelism of each axis. Their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def batch(self) -> int:
        """The number of ranks that read different rows of the global batch."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class Folders:
    """The folders that a run writes to. `dump` is the run folder, which contains the others."""

    dump: str
    checkpoint: str
    tensorboard: str
    traces: str
    memory_snapshots: str
    comm_traces: str


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer without loading it. `kind`: bytes, huggingface, tiktoken, missing; none for
    token files whose tokenizer is not configured.

    `used_vocab_size`: one more than the largest id that a document can have. It is less than `vocab_size` if special
    tokens were added that no document has. `notices`: messages about its files.
    """

    kind: str
    path: str
    vocab_size: int | None
    used_vocab_size: int | None = None
    notices: tuple[str, ...] = ()

    @property
    def assets(self) -> str | None:
        """The path to build the tokenizer from; None if there is none."""
        return self.path if self.kind not in ("none", "missing") else None


@dataclass(frozen=True)
class BackendFacts:
    """The properties of one communication backend: an entry of `comm.backend.BACKENDS`.

    `device_type`: device of the tensors that it moves, and so of a run over it. `carries`: the dtypes that it can move
    for `fully_shard` (`float32`, `bfloat16`, `float64`, `float8`) and the features that it supports
    (`async_tensor_parallel`). `fallback_backend`: the backend of everything except the parameters and gradients of
    `shard`, if that is another one; such a backend carries nothing in a run that shards nothing. `on_host`: the backend
    of CPU tensors. `capability`: minimum compute capability of a device. `needs`: what PyTorch must offer, as in
    `Machine.offers`. `transport`: "module:class" of the transport of `comm.slots`, if parameters and gradients go
    through symmetric memory (`comm.heap`).
    """

    name: str
    device_type: str
    carries: frozenset[str]
    fallback_backend: str | None = None
    on_host: str = "gloo"
    capability: tuple[int, int] | None = None
    needs: str | None = None
    transport: str | None = None


@dataclass(frozen=True)
class ValidationSpec:
    """What a validation reads of each held-out set: its first `windows` windows, or all if None. They do not depend on
    the layout. `local_batch_size`: rows of a batch of one data-parallel rank."""

    seq_len: int
    local_batch_size: int
    windows: int | None


@dataclass(frozen=True)
class RunSpec:
    """A run with every automatic choice made and every `-1` filled in."""

    world_size: int
    degrees: Degrees
    model: ModelSpec
    tokenizer: TokenizerFacts
    seq_len: int
    local_batch_size: int  # rows in one micro-batch of one rank
    global_batch_size: int  # rows in one optimizer step of the whole run
    accumulation_steps: int  # passes of local_batch_size rows of one rank in one step
    micro_batches: int  # of one rank in one step: those passes, which a pipeline divides further
    steps: int
    seed: int
    reshard_after_forward: bool
    reshard_ends: bool  # also of the units that the backward pass needs first
    reduce_gradients: str  # once | every_micro_batch
    reduce_reason: str  # the reason for that choice, in a few words
    backend: str | None  # None: nccl with CUDA, else gloo, decided at the start
    folders: Folders
    stage_ranks: tuple[int, ...] = (0,)  # the pipeline rank of each stage
    custom_schedule: PipelineOrder | None = None  # that of the CSV file, if any
    validation: ValidationSpec | None = None  # None: off
    notices: tuple[str, ...] = ()

    @property
    def rows_per_rank(self) -> int:
        """Rows of the global batch that one data-parallel rank reads in one step."""
        return self.global_batch_size // self.degrees.batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len
