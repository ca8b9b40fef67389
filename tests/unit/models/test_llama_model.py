"""The model against the reference implementation of Hugging Face, and in its own properties."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.models.llama.hf_config import hf_config
from quadriga.models.llama.model import Llama, rope_frequencies
from quadriga.models.llama.names import LlamaTensorNames
from quadriga.models.registry import parallel_plan
from quadriga.parallel.materialize import materialize

TINY = ModelSpec(name="llama3", flavor="tiny", dim=64, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=96, vocab_size=131)
to_hf = LlamaTensorNames(TINY).hf_name  # the same for all sizes
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _build(spec: ModelSpec, seed: int = 1) -> Llama:
    with torch.device("meta"):
        model = Llama(spec)
    materialize(model, parallel_plan(spec).parameters, seed, CPU)
    return model


def _far_from_initial(model: Llama) -> Llama:
    """With weights under which every part of the model matters; initial ones leave the embeddings almost as they are,
    where an error would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(torch.randn_like(parameter) * 0.1)
    return model


def _tokens(rows: int = 2, seq: int = 24, vocab: int = TINY.vocab_size) -> torch.Tensor:
    return torch.randint(vocab, (rows, seq))


# A short original context, so that positions within reach of a test see slow, blended and fast frequencies.
SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)


@pytest.mark.parametrize("scaling", [None, SCALED, RopeScaling(factor=32.0)], ids=["plain", "scaled", "llama3.2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [2, 8], ids=["gqa", "mha"])
def test_logits_equal_those_of_transformers(scaling: RopeScaling | None, tied: bool, kv_heads: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = dataclasses.replace(TINY, rope_scaling=scaling, tie_embeddings=tied, n_kv_heads=kv_heads)
    ours = _far_from_initial(_build(spec))
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config(spec)))
    result = theirs.load_state_dict(
        {to_hf(name): tensor for name, tensor in ours.state_dict().items()}, strict=not tied
    )
    assert not result.unexpected_keys
    assert result.missing_keys == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    tokens = _tokens(seq=300)
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-4


def test_every_tensor_has_its_name_at_hugging_face() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = Llama(TINY).state_dict()
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**hf_config(TINY))).state_dict()
    assert {to_hf(name): tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_names_that_are_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wx\.weight"):
        to_hf("layers.0.attention.wx.weight")


def test_scaled_frequencies_by_hand() -> None:
    scaling = RopeScaling(factor=8.0, original_max_position=8192)
    plain = rope_frequencies(128, 500_000.0, None, CPU).double()
    scaled = rope_frequencies(128, 500_000.0, scaling, CPU).double()
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns >= 4.0], plain[turns >= 4.0])
    torch.testing.assert_close(scaled[turns <= 1.0], plain[turns <= 1.0] / 8)
    between = (turns > 1.0) & (turns < 4.0)
    kept = (turns[between] - 1.0) / 3.0
    torch.testing.assert_close(scaled[between], kept * plain[between] + (1 - kept) * plain[between] / 8)
    assert between.any()


def test_it_learns_with_nothing_distributed() -> None:
    spec = dataclasses.replace(TINY, n_layers=2, vocab_size=32)
    model = _build(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = _tokens(4, 33, 32)
    losses = []
    for _ in range(60):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(32.0).log().item(), abs=0.9)
    assert losses[-1] < 0.2, "128 fixed tokens are learnt by heart"
    assert not torch.distributed.is_initialized()


def test_a_token_changes_only_what_follows_it() -> None:
    model, tokens = _far_from_initial(_build(TINY)), _tokens(1, 20)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-6)
    assert ((before - after).abs().amax(-1)[0, 11:] > 1e-4).all()


def test_positions_say_where_the_tokens_stand() -> None:
    model, tokens = _far_from_initial(_build(dataclasses.replace(TINY, rope_scaling=SCALED))), _tokens(2, 16)
    with torch.no_grad():
        plain = model(tokens)
        assert torch.equal(plain, model(tokens, torch.arange(16)))
        # Rotary attention sees distances only: all positions moved by the same amount change nothing but rounding ...
        torch.testing.assert_close(model(tokens, torch.arange(16) + 50), plain, rtol=0, atol=1e-4)
        # ... and other distances change much.
        assert (model(tokens, torch.arange(16) * 5) - plain).abs().max() > 1e-2


def test_parts_of_the_model_make_up_the_whole() -> None:
    whole, tokens = _build(TINY), _tokens()
    first, last = _build(TINY), _build(TINY)
    first.norm = first.output = last.tok_embeddings = None
    del first.layers["2"], last.layers["0"], last.layers["1"]
    assert set(first.state_dict()) | set(last.state_dict()) == set(whole.state_dict())
    with torch.no_grad():
        assert torch.equal(last(first(tokens)), whole(tokens))


def test_heads_are_counted_from_what_the_projections_return() -> None:
    """Half of the heads give the attention that a rank of a two-way tensor-parallel cut adds to the sum."""
    spec = TINY
    block = _build(spec).layers["0"].attention
    x, cos, sin = torch.randn(2, 10, spec.dim), torch.randn(10, 1, spec.head_dim), torch.randn(10, 1, spec.head_dim)
    with torch.no_grad():
        whole = block(x, cos, sin)
        parts = []
        for rank in range(2):
            part = _build(spec).layers["0"].attention
            for name in ("wq", "wk", "wv"):
                weight = getattr(block, name).weight
                getattr(part, name).weight = torch.nn.Parameter(weight.chunk(2, dim=0)[rank])
            part.wo.weight = torch.nn.Parameter(block.wo.weight.chunk(2, dim=1)[rank])
            parts.append(part(x, cos, sin))
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_bfloat16_follows_float32_closely() -> None:
    model, tokens = _build(TINY), _tokens(2, 64)
    with torch.no_grad():
        exact = model(tokens)
        half = model.bfloat16()
        half.reset_buffers()
        logits = half(tokens)
    assert logits.dtype == torch.bfloat16
    assert half.rope_frequencies.dtype == torch.float32
    assert F.cosine_similarity(logits.float(), exact, dim=-1).min() > 0.999


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from within the compiler,
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # and this one too
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_block_compiles_to_one_graph(kv_heads: int) -> None:
    spec = dataclasses.replace(TINY, n_layers=2, n_kv_heads=kv_heads)
    eager, compiled = _build(spec), _build(spec)
    for layer in compiled.layers.values():
        layer.compile(fullgraph=True)
    tokens = _tokens()
    losses = [model(tokens).logsumexp(-1).mean() for model in (eager, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
