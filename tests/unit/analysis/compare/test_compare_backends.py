"""A backend is credited for the bytes that the traces show, and for nothing else."""

from __future__ import annotations

import pytest
from run_folders import analysis, collective, make_pair, no_traces

from quadriga.analysis.compare.comparison import compare_settings
from quadriga.analysis.compare.evidence import analyse_setting, verify_backend
from quadriga.analysis.compare.report import format_answers
from quadriga.analysis.compare.runs import read_setting
from quadriga.errors import Problem, UserError

BACKEND = "comm.backend"


@pytest.fixture
def judged(tmp_path):
    """Judge a setting with two repeats that asked for a backend, by what its traces say."""

    def judge(asked, *collectives, declared=None, analyse=None):
        other = {"backend": asked, **({"backends": declared} if declared else {})}
        make_pair(tmp_path, [0.1] * 2, [0.1] * 2, keys={BACKEND: asked}, environment=other)
        setting = read_setting("b", tmp_path / "b", 5)
        return verify_backend(setting, analyse_setting(setting, analyse or (lambda folder: analysis(*collectives))))

    return judge


def test_the_backend_that_carried_all_bytes_is_credited(judged):
    found = judged("gloo", collective("shard", "gloo", 300.0), collective("tp", "gloo", 100.0))
    assert found["credited"]
    assert found["why"] == "gloo carried 100.0 % of the bytes"
    assert found["carried"] == [
        {"axis": "shard", "backend": "gloo", "share_of_bytes": 0.75},
        {"axis": "tp", "backend": "gloo", "share_of_bytes": 0.25},
    ]


def test_nvshmem_that_was_asked_for_while_nccl_carried_the_bytes_is_not_credited(judged):
    """The public benchmark of this question: an allocator was chosen, and NCCL went on as before."""
    found = judged("nvshmem", collective("shard", "nccl", 1e9))
    assert not found["credited"]
    assert found["why"] == "not credited: nvshmem was asked for, and nccl carried 100.0 % of the bytes (shard)"


def test_nor_where_it_carried_a_part_of_what_it_declared(judged):
    declared = {"shard": "nvshmem", "dp_replicate": "nccl"}
    found = judged(
        "nvshmem", collective("shard", "nvshmem", 900.0), collective("shard", "nccl", 100.0), declared=declared
    )
    assert not found["credited"]
    assert "nccl carried 10.0 % of the bytes (shard)" in found["why"]


def test_what_it_declared_to_stay_with_another_backend_may_stay_there(judged):
    declared = {"shard": "nvshmem", "dp_replicate": "nccl"}
    own = collective("shard", "nvshmem", 900.0), collective("dp_replicate", "nccl", 100.0)
    found = judged("nvshmem", *own, declared=declared)
    assert found["credited"]
    assert found["why"] == "nvshmem carried 90.0 % of the bytes; dp_replicate is on nccl"


def test_without_a_declaration_the_same_bytes_are_strays(judged):
    assert not judged("nvshmem", collective("shard", "nvshmem", 900.0), collective("dp_replicate", "nccl", 100.0))[
        "credited"
    ]


def test_a_backend_that_declared_every_axis_away_is_not_credited(judged):
    found = judged("nvshmem", collective("shard", "nccl", 100.0), declared={"shard": "nccl"})
    assert not found["credited"]


def test_a_few_small_sums_do_not_matter(judged):
    assert judged("nccl", collective("shard", "nccl", 1e9), collective("world", "gloo", 64.0))["credited"]


def test_what_the_hosts_agree_on_is_no_part_of_the_bytes(judged):
    found = judged("nccl", collective("shard", "nccl", 64.0), collective("host", "gloo", 1e9))
    assert found["credited"]
    assert [each["axis"] for each in found["carried"]] == ["shard"]


def test_a_backend_that_the_trace_does_not_name_is_no_evidence(judged):
    found = judged("nccl", collective("shard", None, 1e9))
    assert found["why"] == "not credited: nccl was asked for, and unknown carried 100.0 % of the bytes (shard)"


def test_names_of_kernels_alone_are_no_evidence(judged):
    found = judged("nccl", collective("shard", "nccl", 900.0), collective("tp", "nccl", 100.0, by="name"))
    assert not found["credited"]
    assert "10.0 % of the bytes are known only by the name of a kernel" in found["why"]


@pytest.mark.parametrize(
    ("kernels", "credited"),
    [
        (["ncclSymkDevKernel_AllGather_LLMC(ncclSymkDevWorkArgs)"], True),
        (["ncclDevKernel_AllGather_RING_LL", "ncclSymkDevKernel_ReduceScatter_LL_sum_bf16"], False),
        ([], False),
    ],
)
def test_symmetric_memory_of_nccl_is_known_by_its_kernels(kernels, credited, judged):
    """Its calls look like all others of NCCL, and an axis that stays with plain NCCL has plain kernels."""

    def analyse(folder):
        return analysis(collective("shard", "nccl", 900.0), collective("tp", "nccl", 100.0), kernels=kernels)

    found = judged("nccl-symm", declared={"shard": "nccl-symm", "tp": "nccl", "norms": "nccl"}, analyse=analyse)
    assert found["credited"] == credited
    expected = (
        "nccl-symm carried 90.0 % of the bytes; tp is on nccl" if credited else "nccl carried 100.0 % of the bytes"
    )
    assert expected in found["why"]


def test_bytes_that_no_trace_states_are_no_evidence(judged):
    found = judged("nvshmem", collective("shard", "nvshmem", 900.0), collective("shard", "symm_mem", None))
    assert found["why"] == "not credited: the traces do not show the bytes of all_gather (shard)"


def test_sums_over_all_ranks_are_where_the_run_declared_them(judged):
    declared = {"shard": "nvshmem", "norms": "nccl", "host": "gloo"}
    own = collective("shard", "nvshmem", 900.0), collective("loss", "nccl", 90.0), collective("host", "gloo", 10.0)
    assert judged("nvshmem", *own, declared=declared)["credited"]


def test_without_a_trace_nothing_is_credited(judged):
    found = judged("gloo", analyse=no_traces)
    assert (found["credited"], found["carried"]) == (False, None)
    assert found["why"] == ("not credited: no trace shows who carried the bytes (repeat 1, 2: there are no traces)")


def test_every_repeat_needs_its_trace(judged):
    def half(folder):
        if folder.name == "repeat-2":
            raise UserError(Problem("RUN", "damaged"))
        return analysis(collective("shard", "gloo", 1.0))

    found = judged("gloo", analyse=half)
    assert not found["credited"]
    assert found["why"].endswith("(repeat 2: damaged)")
    assert found["carried"] == [{"axis": "shard", "backend": "gloo", "share_of_bytes": 1.0}]


def test_a_run_that_sent_nothing_shows_nothing(judged):
    assert judged("gloo")["why"] == "not credited: the traces show no bytes between ranks"


def compared(tmp_path, carried):
    """NCCL against NVSHMEM, which is faster by a tenth in each of four rounds."""
    other = {"backend": "nvshmem", "backends": {"shard": "nvshmem"}}
    folders = make_pair(tmp_path, [0.1] * 4, [0.09] * 4, keys={BACKEND: "nvshmem"}, environment=other)
    for run in sorted((tmp_path / "a").iterdir()):  # which asked for gloo, as made
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(text.replace('backend = "gloo"', 'backend = "nccl"'))

    def analyse(folder):
        return analysis(collective("shard", carried if folder.parent.name == "b" else "nccl", 1e9))

    settings = [read_setting(folder.name, folder, 5) for folder in folders]
    return compare_settings(settings, varied=[BACKEND], accepted=(), analyse=analyse, warmup=5)


def test_no_winner_is_named_between_backends_of_which_one_did_not_carry_the_bytes(tmp_path):
    found = compared(tmp_path, carried="nccl")
    ratio = found["figures"][0]["ratios"][0]
    assert ratio["ratio"] == pytest.approx(0.9)  # the figure is shown
    assert {each["verdict"] for figure in found["figures"] for each in figure["ratios"]} <= {
        "not credited",
        "no difference shown",
    }
    (answer,) = format_answers(found)
    assert answer.startswith("no winner is named between a and b (b: not credited: nvshmem was asked for, and nccl")
    assert "faster" not in answer


def test_where_both_carried_their_bytes_there_is_a_winner(tmp_path):
    found = compared(tmp_path, carried="nvshmem")
    assert all(each["credited"] for each in found["backend"])
    assert next(format_answers(found)).startswith("b is 11.1 % faster than a")
