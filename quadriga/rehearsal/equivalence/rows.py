"""The table of layouts that must train as one process does: one row per layout. No torch here.

A row trains the debug model in float32 with short sequences and a fixed global batch. Its `model` keys (more layers,
tied matrices) apply to the reference process too. Its `layout_keys` (a schedule, a method) must not change training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from quadriga.config.resolve import DEGREES
from quadriga.config.run_spec import Degrees

Keys = tuple[tuple[str, str], ...]

ROWS_PER_STEP = 16  # global batch: two rows for each of 8 data-parallel ranks, and enough for a pipeline of 8
SEQ_LEN = 64
STEPS = 5
# The largest allowed relative differences: of the loss of a step, of its gradient norm, and of a final weight matrix
# (norm of the difference / norm of the matrix). docs/numerics.md has the measured ones.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-4, "weights": 1e-4},
    # 8 bits of precision: one rounding is up to 4e-3, and another order of summation rounds differently.
    "bfloat16": {"loss": 1e-2, "grad_norm": 5e-2, "weights": 5e-2},
}

DEGREE_KEYS = {axis: DEGREES[axis] for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
SHARED: Keys = (
    ("job.description", "equivalence"),
    ("model.name", "llama3"),
    ("model.flavor", "debugmodel"),
    ("model.hf_assets_path", "builtin:bytes"),
    ("training.dataset", "builtin"),
    ("training.dtype", "float32"),
    ("training.mixed_precision_param", "float32"),
    ("training.mixed_precision_reduce", "float32"),
    ("optimizer.lr", "8e-4"),
    ("activation_checkpoint.mode", "none"),
    ("training.steps", str(STEPS)),
    ("training.seq_len", str(SEQ_LEN)),
    ("training.global_batch_size", str(ROWS_PER_STEP)),
    ("metrics.log_freq", "1"),
    ("metrics.enable_tensorboard", "false"),
    ("profiling.enable_profiling", "false"),
    ("checkpoint.enable", "true"),
    ("checkpoint.last_save_model_only", "true"),  # the final weights are compared
    ("lr_scheduler.warmup_steps", "2"),
    ("debug.seed", "42"),
)


@dataclass(frozen=True)
class Row:
    """One layout. `local_batch` 0: all rows of a step in one pass. `label`: shown in place of the `model` keys."""

    degrees: Degrees
    layout_keys: Keys = ()
    model: Keys = ()
    local_batch: int = 0
    label: str = ""
    slow: bool = True

    @property
    def tolerance(self) -> Mapping[str, float]:
        return TOLERANCES[dict(self.model).get("training.mixed_precision_param", "float32")]

    @property
    def ranks(self) -> int:
        return self.degrees.world_size

    @property
    def name(self) -> str:
        cuts = [f"{axis}={size}" for axis in DEGREE_KEYS if (size := getattr(self.degrees, axis)) > 1]
        named = self.layout_keys if self.label else (*self.layout_keys, *self.model)
        settings = [f"{key.removeprefix('parallelism.')}={value}" for key, value in named]
        accumulation = [f"local_batch={self.local_batch}"] if self.local_batch else []
        return ", ".join([*(cuts or ["one rank"]), *accumulation, *settings, *filter(None, [self.label])])

    def keys(self) -> Keys:
        """All keys that the row's run sets."""
        rows = self.local_batch or ROWS_PER_STEP // self.degrees.batch
        cuts = tuple((key, str(getattr(self.degrees, axis))) for axis, key in DEGREE_KEYS.items())
        return (*SHARED, *cuts, ("training.local_batch_size", str(rows)), *self.model, *self.layout_keys)

    def one_rank(self) -> Row:
        """The row of the reference process."""
        return Row(Degrees(), model=self.model)


def format_arguments(keys: Keys) -> list[str]:
    """Keys as command-line arguments."""
    return [argument for key, value in keys for argument in (f"--{key}", value)]


def parse_layout(text: str) -> Degrees:
    """Parse `dp_shard=2,tp=2`. Axes that are not named have degree 1.

    Raises:
        ValueError: an unknown axis, or a degree that is not a positive integer; the message names it.
    """
    found: dict[str, int] = {}
    for part in filter(None, (text_part.strip() for text_part in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in DEGREE_KEYS:
            raise ValueError(f"{axis!r} is not an axis; the axes are {', '.join(DEGREE_KEYS)}")
        if not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ValueError(f"{part!r} is not a degree; write {axis}=2")
        found[axis] = int(size)
    return Degrees(**found)


def _keys(**named: str | int | bool) -> Keys:
    """`pipeline_parallel_schedule="GPipe"` as a key of `parallelism`; `table__name` as a key of another table."""
    written = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in named.items()}
    return tuple(
        (name.replace("__", ".") if "__" in name else f"parallelism.{name}", value) for name, value in written.items()
    )


def _one_axis() -> Iterator[Row]:
    for axis in ("dp_shard", "dp_replicate", "tp", "cp", "pp"):
        for size in (2, 4, 8):
            deeper = _keys(model__n_layers=16) if (axis, size) == ("pp", 8) else ()
            yield Row(Degrees(**{axis: size}), model=deeper, slow=size > 2)


def _two_axes() -> Iterator[Row]:
    pairs = list(combinations(DEGREE_KEYS, 2))
    for first, second in pairs:
        yield Row(Degrees(**{first: 2, second: 2}), slow=(first, second) != ("dp_shard", "tp"))
    for number, (first, second) in enumerate(pairs):
        sizes = ((2, 4), (4, 2))[number % 2]
        yield Row(Degrees(**{first: sizes[0], second: sizes[1]}))


def _three_axes() -> Iterator[Row]:
    for axes in combinations(DEGREE_KEYS, 3):
        yield Row(Degrees(**dict.fromkeys(axes, 2)))


def _four_axes() -> Iterator[Row]:
    yield Row(Degrees(dp_shard=2, tp=2, cp=2, pp=2))


def _models() -> Iterator[Row]:
    """Uneven layers, tied matrices, fewer heads for keys and values."""
    yield Row(Degrees(pp=2), model=_keys(model__n_layers=5))
    yield Row(Degrees(pp=2), _keys(pipeline_parallel_schedule="Interleaved1F1B"), _keys(model__n_layers=7))
    tied = _keys(model__tie_embeddings=True)
    for degrees in (Degrees(dp_shard=2), Degrees(tp=2), Degrees(cp=2), Degrees(dp_shard=2, tp=2)):
        yield Row(degrees, model=tied)
    yield Row(Degrees(tp=2), _keys(disable_loss_parallel=True), tied)
    grouped = _keys(model__n_kv_heads=4)
    for degrees in (Degrees(tp=4), Degrees(dp_shard=2, tp=2), Degrees(pp=2, tp=2)):
        yield Row(degrees, model=grouped)
    for method in ("allgather", "ring", "ulysses"):
        yield Row(Degrees(cp=2), _keys(context_parallel_method=method), grouped, slow=method != "ring")
    yield Row(Degrees(cp=2, tp=2), _keys(context_parallel_method="ulysses"), grouped)


def _accumulation() -> Iterator[Row]:
    """Gradients reduced once per step, or after every micro-batch."""
    for degrees in (Degrees(dp_shard=2), Degrees(dp_replicate=2, dp_shard=2), Degrees(dp_shard=2, tp=2)):
        for when in ("once", "every_micro_batch"):
            yield Row(degrees, _keys(reduce_gradients=when), local_batch=2)
    for when in ("once", "every_micro_batch"):
        yield Row(Degrees(pp=2, dp_shard=2), _keys(reduce_gradients=when), local_batch=4)
        yield Row(Degrees(pp=2, dp_replicate=2, dp_shard=2), _keys(reduce_gradients=when), local_batch=2)


def _schedules() -> Iterator[Row]:
    several = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    for schedule in ("GPipe", *several):
        chosen = _keys(pipeline_parallel_schedule=schedule)
        yield Row(Degrees(pp=2), chosen, slow=schedule != "ZBVZeroBubble")
        yield Row(Degrees(pp=2, dp_shard=2), chosen)
    yield Row(Degrees(pp=2, tp=2), _keys(pipeline_parallel_schedule="Interleaved1F1B"))
    yield Row(Degrees(pp=2, tp=2), _keys(pipeline_parallel_schedule="ZBVZeroBubble"))
    yield Row(Degrees(pp=2, dp_shard=2, tp=2), _keys(pipeline_parallel_schedule="DualPipeV"))
    yield Row(Degrees(pp=2), _keys(pipeline_parallel_microbatch_size=4))
    yield Row(Degrees(pp=2), _keys(pipeline_parallel_layers_per_stage=2, pipeline_parallel_schedule="Interleaved1F1B"))


def _attention() -> Iterator[Row]:
    """Each method of context parallelism, with two chunks of the sequence per rank or one."""
    for method in ("ring", "ulysses"):
        chosen = _keys(context_parallel_method=method)
        for degrees in (Degrees(cp=2), Degrees(cp=4), Degrees(cp=2, tp=2), Degrees(dp_shard=2, cp=2)):
            yield Row(degrees, chosen, slow=degrees != Degrees(cp=2) or method == "ring")
        yield Row(Degrees(pp=2, cp=2), chosen)
    for method in ("allgather", "ring", "ulysses"):
        yield Row(Degrees(cp=2), _keys(context_parallel_method=method, context_parallel_load_balancer="none"))


def _switches() -> Iterator[Row]:
    whole = _keys(enable_sequence_parallel=False)
    gathered = _keys(disable_loss_parallel=True)
    for how in (whole, gathered, whole + gathered):
        yield Row(Degrees(tp=2), how, slow=how != whole)
        yield Row(Degrees(dp_shard=2, tp=2), how)
    yield Row(Degrees(pp=2, tp=2), whole)
    yield Row(Degrees(cp=2, tp=2), whole)
    for policy in ("always", "never"):
        yield Row(Degrees(dp_shard=2, tp=2), _keys(fsdp_reshard_after_forward=policy))
        yield Row(Degrees(pp=2, dp_shard=2), _keys(fsdp_reshard_after_forward=policy))
    yield Row(Degrees(dp_shard=2), _keys(fsdp_prefetch=2))


def _loss_chunks() -> Iterator[Row]:
    """Chunks of unequal length; logits that are replicated, sharded, gathered, and on the last pipeline stage."""
    chosen = _keys(training__loss_chunks=3)
    yield Row(Degrees(tp=2), chosen)
    for degrees in (Degrees(dp_shard=2), Degrees(cp=2), Degrees(pp=2), Degrees(dp_shard=2, tp=2)):
        yield Row(degrees, chosen)
    yield Row(Degrees(dp_shard=2, tp=2), (*chosen, *_keys(disable_loss_parallel=True, enable_sequence_parallel=False)))
    yield Row(Degrees(pp=2, tp=2), (*chosen, *_keys(pipeline_parallel_schedule="ZBVZeroBubble")))


def _recompute() -> Iterator[Row]:
    modes = {
        "none": _keys(activation_checkpoint__mode="none"),
        "full": _keys(activation_checkpoint__mode="full"),
        "op": _keys(activation_checkpoint__mode="selective", activation_checkpoint__selective_ac_option="op"),
    }
    for chosen in modes.values():
        for degrees in (Degrees(dp_shard=2, tp=2), Degrees(dp_shard=2, cp=2), Degrees(pp=2, dp_shard=2)):
            yield Row(degrees, chosen)


def _compiled() -> Iterator[Row]:
    compiled = _keys(compile__enable=True)
    one_axis = (Degrees(dp_shard=2), Degrees(tp=2), Degrees(cp=2), Degrees(pp=2))
    for degrees in (*one_axis, Degrees(dp_shard=2, tp=2), Degrees(cp=2, tp=2)):
        yield Row(degrees, compiled)
    yield Row(Degrees(cp=2), (*compiled, *_keys(context_parallel_method="ring")))


def _bfloat16() -> Iterator[Row]:
    """Each axis with compute in bfloat16 and parameters in float32, and with parameters in bfloat16 too.

    The model is small, because CPUs without bfloat16 units are about a hundred times slower in bfloat16.
    """
    small = _keys(model__dim=64, model__n_layers=4, model__ffn_dim=128, model__vocab_size=512)
    computed = _keys(training__mixed_precision_param="bfloat16")
    held = (*computed, *_keys(training__dtype="bfloat16"))
    axes = tuple(Degrees(**{axis: 2}) for axis in DEGREE_KEYS)
    for dtypes, label in ((computed, "small model, bf16 compute"), (held, "small model, bf16 parameters")):
        for degrees in (*axes, Degrees(dp_shard=2, tp=2), Degrees(pp=2, cp=2, tp=2)):
            yield Row(degrees, model=(*small, *dtypes), label=label)


SECTIONS: dict[str, tuple[Row, ...]] = {
    "one axis": tuple(_one_axis()),
    "two axes": tuple(_two_axes()),
    "three axes": tuple(_three_axes()),
    "four axes": tuple(_four_axes()),
    "other models": tuple(_models()),
    "gradient accumulation": tuple(_accumulation()),
    "pipeline schedules": tuple(_schedules()),
    "context methods": tuple(_attention()),
    "switches": tuple(_switches()),
    "loss in pieces": tuple(_loss_chunks()),
    "recompute": tuple(_recompute()),
    "compile": tuple(_compiled()),
    "bfloat16": tuple(_bfloat16()),
}
ROWS: tuple[Row, ...] = tuple(row for rows in SECTIONS.values() for row in rows)
