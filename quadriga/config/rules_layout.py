"""Rules of the layout: what the backend supports, and divisibility between the model, the batch and the degrees."""

from __future__ import annotations

from math import isqrt

from quadriga.config.rules import Conflict, Findings, RuleContext, rule
from quadriga.config.run_spec import BackendFacts
from quadriga.errors import nearest

DP_REPLICATE = "parallelism.data_parallel_replicate_degree"
DP_SHARD = "parallelism.data_parallel_shard_degree"
TP = "parallelism.tensor_parallel_degree"
CP = "parallelism.context_parallel_degree"
FROM_CHECKPOINT = "the checkpoints in "  # prefix of the `origin` of values from a checkpoint
LOCAL, GLOBAL, SEQ_LEN = "training.local_batch_size", "training.global_batch_size", "training.seq_len"
BACKEND = "comm.backend"
ASYNC_TP = "parallelism.enable_async_tensor_parallel"
PREFETCH = "parallelism.fsdp_prefetch"


@rule(BACKEND)
def backend_is_known(ctx: RuleContext) -> Findings:
    name = ctx.config.comm.backend
    if name is not None and name not in ctx.backends:
        usable = ", ".join(ctx.backends)
        yield Conflict("no backend has this name", allowed=usable, nearest=nearest(name, ctx.backends))


@rule(BACKEND, DP_SHARD, CP)
def backend_has_something_to_carry(ctx: RuleContext) -> Findings:
    facts, degrees = _backend_facts(ctx), ctx.degrees
    if facts is not None and facts.fallback_backend is not None and degrees.dp_shard * degrees.cp == 1:
        what = f"{facts.name} carries only sharded parameters and gradients, and this run shards none"
        fix = f"choose {facts.fallback_backend}, which would carry all bytes of this run, or shard over 2 or more ranks"
        yield Conflict(what, fix)


@rule(BACKEND, ASYNC_TP)
def backend_overlaps_tensor_parallelism(ctx: RuleContext) -> Findings:
    facts = _backend_facts(ctx)
    wanted = ctx.config.parallelism.enable_async_tensor_parallel and ctx.degrees.tp > 1
    if facts and wanted and "async_tensor_parallel" not in facts.carries:
        yield Conflict(
            "this backend cannot overlap communication with matrix products",
            _backends_that_carry(ctx, "async_tensor_parallel"),
        )


@rule(BACKEND, PREFETCH)
def backend_has_a_buffer_for_each_gather(ctx: RuleContext) -> Findings:
    """`comm.heap.GATHER_BUFFERS` are as many as gathering one block ahead uses at a time."""
    facts, ahead = _backend_facts(ctx), ctx.config.parallelism.fsdp_prefetch
    if facts is not None and facts.transport is not None and (ahead or 1) > 1:
        yield Conflict("the symmetric memory of this backend has buffers for one block ahead", f"leave {PREFETCH} out")


@rule("training.document_mask", CP, BACKEND, "training.mixed_precision_param", "model.dim", "model.n_heads")
def heads_fit_the_kernels_of_gpus(ctx: RuleContext) -> Findings:
    facts, width, training = _backend_facts(ctx), ctx.model.head_dim, ctx.config.training
    calls_kernels = training.document_mask or ctx.degrees.cp > 1
    on_gpus = facts is not None and facts.device_type == "cuda"
    if calls_kernels and on_gpus and training.mixed_precision_param == "bfloat16" and width % 8:
        what = f"flash attention needs heads whose width is a multiple of 8; it is {width}"
        yield Conflict(what, 'compute in float32 (training.mixed_precision_param = "float32"), or change the model')


def _backend_facts(ctx: RuleContext) -> BackendFacts | None:
    return ctx.backends.get(ctx.config.comm.backend or "")


def _backends_that_carry(ctx: RuleContext, feature: str) -> str:
    able = [name for name, facts in ctx.backends.items() if feature in facts.carries]
    return f"choose {' or '.join(able)}" if able else "switch the feature off: no backend supports it"


@rule("model.flavor", "model.dim", "model.n_heads")
def width_divides_into_heads(ctx: RuleContext) -> Findings:
    if ctx.model.dim % ctx.model.n_heads:
        yield Conflict(
            "the heads must divide the width", divisor_hint("model.n_heads", ctx.model.dim, ctx.model.n_heads)
        )
    elif ctx.model.head_dim % 2:
        what = f"rotary position embeddings need heads of even width, not {ctx.model.head_dim}"
        yield Conflict(what, "choose dim = n_heads x an even number")


@rule("model.flavor", "model.n_heads", "model.n_kv_heads")
def query_heads_divide_into_kv_heads(ctx: RuleContext) -> Findings:
    heads, kv_heads = ctx.model.n_heads, ctx.model.n_kv_heads
    if heads % kv_heads:
        yield Conflict(
            "the key and value heads must divide the query heads", divisor_hint("model.n_kv_heads", heads, kv_heads)
        )


@rule("model.flavor", "model.vocab_size", "model.hf_assets_path")
def tokenizer_fits_the_model(ctx: RuleContext) -> Findings:
    size, rows = ctx.tokenizer.vocab_size, ctx.model.vocab_size
    if size is None:
        return
    if size > rows >= (ctx.tokenizer.used_vocab_size or size):
        yield f"the tokenizer has {size:,} ids, the model {rows:,} rows: no document has the special tokens above them"
    elif size > rows:
        what = f"the tokenizer has {size:,} ids and the model only {rows:,} rows in its embedding"
        yield Conflict(what, f"set model.vocab_size to {size} or more, or choose the tokenizer of the model")
    elif size < rows:
        yield f"the tokenizer has {size:,} ids, the model {rows:,} rows: the other rows are never used"


@rule(TP, "model.flavor", "model.n_heads", "model.n_kv_heads")
def heads_divide_over_tensor_ranks(ctx: RuleContext) -> Findings:
    tp = ctx.degrees.tp
    for name, heads in (("attention heads", ctx.model.n_heads), ("key and value heads", ctx.model.n_kv_heads)):
        if heads % tp:
            yield Conflict(f"{heads} {name} do not divide over {tp} ranks", divisor_hint(TP, heads, tp))


@rule(TP, "model.flavor", "model.ffn_dim", "model.vocab_size")
def widths_divide_over_tensor_ranks(ctx: RuleContext) -> Findings:
    tp = ctx.degrees.tp
    for name, width in (("feed-forward width", ctx.model.ffn_dim), ("vocabulary", ctx.model.vocab_size)):
        if width % tp:
            yield Conflict(f"the {name} of {width} does not divide over {tp} ranks", divisor_hint(TP, width, tp))


@rule(SEQ_LEN, TP, CP, "parallelism.context_parallel_load_balancer")
def sequence_divides_over_ranks(ctx: RuleContext) -> Findings:
    yield from sequence_divides(ctx, SEQ_LEN, ctx.config.training.seq_len)


def sequence_divides(ctx: RuleContext, key: str, seq_len: int) -> Findings:
    """A conflict if sequences of the key do not divide over the context and tensor ranks."""
    tp, cp = ctx.degrees.tp, ctx.degrees.cp
    chunks = 2 if cp > 1 and ctx.config.parallelism.context_parallel_load_balancer == "headtail" else 1
    divisor = tp * cp * chunks
    if seq_len % divisor:
        near = max(seq_len // divisor, 1) * divisor
        what = f"a sequence must divide into {divisor} equal pieces (tp x cp" + (" x 2)" if chunks == 2 else ")")
        yield Conflict(what, f"set {key} to a multiple of {divisor}, such as {near} or {near + divisor}")


@rule(CP, "parallelism.context_parallel_method", TP, "model.flavor", "model.n_heads", "model.n_kv_heads")
def heads_divide_over_ulysses_ranks(ctx: RuleContext) -> Findings:
    cp, tp = ctx.degrees.cp, ctx.degrees.tp
    if cp == 1 or ctx.config.parallelism.context_parallel_method != "ulysses":
        return
    if ctx.model.n_heads % (cp * tp) or ctx.model.n_kv_heads % (cp * tp):
        what = f"`ulysses` exchanges heads, which must divide over the {cp * tp} ranks of cp x tp"
        yield Conflict(what, "choose `allgather` or `ring`, or a degree that divides both numbers of heads")


@rule(CP, "parallelism.context_parallel_load_balancer")
def load_balancer_is_known_here(ctx: RuleContext) -> Findings:
    if ctx.degrees.cp > 1 and ctx.config.parallelism.context_parallel_load_balancer == "ptrr":
        yield Conflict("`ptrr` balances block masks, which no supported model has", allowed='"headtail", or none')


@rule(GLOBAL, LOCAL, DP_REPLICATE, DP_SHARD)
def global_batch_divides_over_ranks(ctx: RuleContext) -> Findings:
    training, dp = ctx.config.training, ctx.degrees.batch
    one_pass = training.local_batch_size * dp
    if training.global_batch_size != -1 and training.global_batch_size % one_pass:
        what = f"the global batch must be a multiple of local batch x data-parallel ranks = {one_pass}"
        near = max(round(training.global_batch_size / one_pass), 1) * one_pass
        rows, rest = divmod(training.global_batch_size, dp)
        resumed = ctx.origin.get(GLOBAL, "").startswith(FROM_CHECKPOINT)  # a resumed run must keep it
        if rest and resumed:
            fix = f"start on a number of data-parallel ranks that divides {training.global_batch_size}"
        elif rest:
            fix = f"set {GLOBAL} to {near}, or change the local batch or the degrees"
        else:
            size = max(size for size in divisors(rows) if size <= training.local_batch_size)
            fix = f"set {LOCAL} to {size}" + ("" if resumed else f", or {GLOBAL} to {near}")
        yield Conflict(what, fix, f"-1, or a multiple of {one_pass}")


@rule("parallelism.expert_parallel_degree", "parallelism.expert_tensor_parallel_degree", "model.name")
def experts_need_a_model_that_has_them(ctx: RuleContext) -> Findings:
    parallelism = ctx.config.parallelism
    if parallelism.expert_parallel_degree > 1 or parallelism.expert_tensor_parallel_degree > 1:
        yield Conflict(f"{ctx.model.name} has no experts", "set both degrees to 1")


def divisor_hint(key: str, whole: int, wrong: int) -> str:
    """A remedy: the divisors of `whole` next below and next above `wrong`."""
    parts = divisors(whole)
    below = max((part for part in parts if part <= wrong), default=1)
    above = min((part for part in parts if part >= wrong), default=whole)
    choice = " or ".join(str(part) for part in dict.fromkeys((below, above)))
    return f"set {key} to a divisor of {whole}, such as {choice}"


def divisors(whole: int) -> list[int]:
    """All divisors, in no particular order."""
    low = [part for part in range(1, isqrt(whole) + 1) if whole % part == 0]
    return [*low, *(whole // part for part in low)]
