"""The workload card of runs on GPUs, from their configurations and what their environment.json would say."""

from __future__ import annotations

from typing import Any

import pytest

from quadriga.analysis.ccl_bench.card import FIELDS, card_errors, field_value
from quadriga.analysis.ccl_bench.folder import RankSummary
from quadriga.cli.arguments import run_from_file
from quadriga.cli.ccl_bench import logged_step_time, profiled_steps
from quadriga.cli.ccl_card import CardOptions, build_card

H100 = {
    "quadriga": "0.1.0",
    "devices": ["NVIDIA H100 80GB HBM3"],
    "cuda": "13.0",
    "nccl": "2.29.3",
    "backend": "nccl",
    "host": "node-1",
    "world_size": 8,
    "libraries": {"torch": "2.13.0"},
    "environment": {"NNODES": "2", "OMP_NUM_THREADS": "8"},
}
NOTHING = CardOptions(None, None, None, dict.fromkeys(CardOptions.ABOUT))
CARRIED = {"shard": [{"collective": "all_gather", "backend": "nccl", "bytes_a_step": 100, "found_by": "linkage"}]}


def card(file: str, *keys: str, ranks: int = 8, given: CardOptions = NOTHING, **environment: Any) -> dict[str, Any]:
    run = run_from_file(f"configs/{file}/{file}.toml", ranks, keys)
    return build_card(
        run, {**H100, **environment}, given, range(6, 11), {"step": 200, "loss": 3.0, "tokens_seen": 1}, CARRIED
    )


@pytest.fixture(autouse=True)
def _in_the_repository(root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def test_the_reference_run_on_two_machines():
    found = card("llama3_8b", "--parallelism.tensor_parallel_degree=2", "--training.global_batch_size=32")
    at = {path.rsplit(".", 1)[-1]: field_value(found, path) for path in FIELDS}
    assert (at["num_params"], at["num_params_embedding"]) == (8_030_261_248, 128_256 * 4096)
    assert (at["num_layers"], at["num_heads"], at["head_dim"], at["batch_size"]) == (32, 32, 128, 32)
    assert (at["dp_replicate"], at["dp_shard"], at["tp"], at["pp"], at["cp"], at["ep"]) == (1, 4, 2, 1, 1, 1)
    assert (at["model"], at["total_count"], at["count_per_node"]) == ("nvidia_h100", 8, 4)
    assert (at["hf_url"], at["model_family"]) == ("https://huggingface.co/meta-llama/Llama-3.1-8B", "llama-3.1-8b")
    assert at["bandwidth_gbps"] == [None, 3600], "450 GB/s by the data sheet; the network is not known"
    assert (at["driver_version"], at["precision"], at["protocol_selection"]) == ("cuda_13.0", "fp32", [None, None])
    assert (field_value(found, "Model-executor.communication_library.name"), at["env"]["NNODES"]) == ("NCCL", "2")
    assert (
        found["workload"]["data"]["local_batch_size"],
        found["workload"]["data"]["gradient_accumulation_steps"],
    ) == (2, 4)
    ours = found["quadriga"]
    assert ours["collective_backend"] == {"declared": "nccl", "achieved": CARRIED}
    assert set(ours["empty_fields"]) == {
        "trace_url", "contributor", "contact", "bandwidth_gbps[0] (scale-out)", "protocol_selection",
    }  # fmt: skip


def test_what_the_user_gave_fills_the_card():
    texts = {name: f"the {name}" for name in CardOptions.ABOUT}
    found = card("llama3_8b", given=CardOptions(200, 2400, 8, texts))
    empty = [path for path in FIELDS if field_value(found, path) in (None, [None, None])]
    assert empty == ["Model-executor.protocol_selection"]
    assert field_value(found, "workload.hardware.network_topo.bandwidth_gbps") == [200, 2400]
    assert found["description"].startswith("the description. Batch: 16 sequences globally = 8 data-parallel ranks x 2")
    traces = [RankSummary(rank, dict.fromkeys(range(7), 2.0), 1024, None) for rank in range(8)]
    known = {8_030_261_248: 525_336_576}
    assert [line for line in card_errors(found, traces, known) if "missing" not in line] == []


@pytest.mark.parametrize(
    ("device", "spelling"),
    [
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100"),
        ("NVIDIA H100 PCIe", "nvidia_h100_pcie"),
        ("AMD Instinct MI300X", "amd_mi300x"),
        ("Abacus 9000", "Abacus 9000"),
    ],
)
def test_devices_are_spelled_as_the_tools_spell_them(device, spelling):
    assert field_value(card("llama3_8b", devices=[device]), "workload.hardware.xpu_spec.model") == spelling


def test_a_tied_embedding_is_noted():
    assert "it is also the output matrix" in card("llama3_1b")["quadriga"]["embedding"]
    assert card("llama3_1b")["hf_url"] == "https://huggingface.co/meta-llama/Llama-3.2-1B"


def test_steps_and_their_times_in_the_log():
    assert profiled_steps(RankSummary(0, {5: 1.0, 6: 1.0, 7: 1.0}, None, None), last_step=20) == [18, 19, 20]
    records = [
        {"step": step, "attempt": attempt, "step_seconds": seconds}
        for step, attempt, seconds in ((10, 1, 9.0), (12, 1, 2.0), (13, 1, 5.0), (14, 2, 7.0), (16, 2, 9.0))
    ]
    assert logged_step_time(records, [11, 12, 13, 14, 15]) == pytest.approx((2 * 2.0 + 5.0) / 3)
    assert logged_step_time(records, [12, 15]) is None, "no line covers one of them alone"
