"""What follows from a configuration once the number of ranks is known. Made by `resolve`, read by the builders."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.config.model_spec import ModelSpec
from quadriga.config.pipeline_order import PipelineOrder


@dataclass(frozen=True)
class Degrees:
    """How many ways each axis cuts the run; their product is the number of ranks."""

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
        """Ranks that read different rows of the global batch."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class Folders:
    """Where a run writes, as paths: `dump` is the run folder and holds the others."""

    dump: str
    checkpoint: str
    tensorboard: str
    traces: str
    memory_snapshots: str
    comm_traces: str


@dataclass(frozen=True)
class TokenizerFacts:
    """What can be known of a tokenizer without loading it. `kind`: bytes, huggingface, tiktoken, missing.

    `used_vocab_size`: one more than the largest id that a document can have, where special tokens with larger ones were
    added that no document gets; `notices`: what there is to note about its files.
    """

    kind: str
    path: str
    vocab_size: int | None
    used_vocab_size: int | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSpec:
    """The run as it will be: every choice made, every `-1` filled in."""

    world_size: int
    degrees: Degrees
    model: ModelSpec
    tokenizer: TokenizerFacts
    seq_len: int
    local_batch_size: int  # rows in one micro-batch of one rank
    global_batch_size: int  # rows in one optimizer step of the whole run
    accumulation_steps: int  # passes of local_batch_size rows that one rank makes in one step
    micro_batches: int  # of one rank in one step: those passes, each cut up where there is a pipeline
    steps: int
    seed: int
    reshard_after_forward: bool
    reduce_gradients: str  # once | every_micro_batch
    reduce_reason: str  # why `auto` chose so, in one clause
    backend: str | None  # None: nccl where CUDA is, else gloo, decided where the run starts
    folders: Folders
    stage_ranks: tuple[int, ...] = (0,)  # which rank along the pipeline holds each stage of the model
    custom_schedule: PipelineOrder | None = None  # of the CSV file, where there is one
    notices: tuple[str, ...] = ()

    @property
    def rows_per_rank(self) -> int:
        """Rows of the global batch that one batch rank reads in one step."""
        return self.global_batch_size // self.degrees.batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len
