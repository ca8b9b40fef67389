"""What earlier versions saved still resumes, to the bit, on several ranks; what is crafted runs nothing on any of them.

`older/step-2.tar.gz` was saved by commit 9b4208f on two ranks (FSDP), before there was a `plan.json`.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crafted import ATTACKS, reseal_manifest
from ranks import RankError, run_ranks
from torch.distributed import checkpoint as dcp
from training import train
from weights import Weights

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import plan
from quadriga.checkpoint.load import load_tensors
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.stored import open_stored
from quadriga.config.schema import Checkpoint
from quadriga.launch.supervisor import main as launch

OLDER = Path(__file__).parent / "older"
NUMBERS = ("loss", "grad_norm", "lr", "tokens_seen")
GIVEN = ("--training.dataset_path", str(OLDER / "text"), "--training.steps=5")
TODAY = ("--lr_scheduler.variant=torchtitan", "--optimizer.decay_norms_and_biases")
# What commit 9b4208f itself trained when it resumed: steps 3, 4, 5, and what `norm_of` is at the end.
THEN = [
    (6.276911497116089, 9.644583702087402, 0.0005333333333333335, 96),
    (6.414763689041138, 11.941086769104004, 0.0004, 128),
    (6.278217077255249, 8.94572925567627, 0.00026666666666666673, 160),
]
NORM_THEN = 0.9974249079823494
Logged = list[tuple[float, ...]]  # NUMBERS of each step


def unpacked(folder: Path) -> Path:
    place = folder / "older/checkpoint"
    with tarfile.open(OLDER / "step-2.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / "step-2"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return unpacked(tmp_path)


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Logged]:
    """An older checkpoint beside the one of step 5, after two ranks went on from it, and what they logged."""
    step = unpacked(tmp_path_factory.mktemp("gone_on"))
    return step, resumed(step, 2)


def empty(step: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in open_stored(step, None).plan.tensors.items()}


def by_dcp(step: Path) -> dict[str, torch.Tensor]:
    """As stock torch.distributed.checkpoint reads a folder; of one that the test trusts."""
    tensors = empty(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=step)
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_older_checkpoint_is_read_as_dcp_reads_it(older: Path) -> None:
    assert not (older / "plan.json").exists()
    ours = empty(older)
    load_tensors(older, ours, None, facts=folders.read_checkpoint(older).files)
    assert len(ours) > 30
    assert sum(tensor.count_nonzero().item() for tensor in ours.values()) > 10_000
    assert same(ours, by_dcp(older))


def resumed(step: Path, ranks: int, *more: str) -> Logged:
    return trained(step.parents[1], ranks, *more)


def trained(folder: Path, ranks: int, *more: str) -> Logged:
    records = train(folder, ranks, *GIVEN, *more, file=str(OLDER / "tiny.toml"))
    assert [record["step"] for record in records] == [3, 4, 5]
    return [tuple(record[name] for name in NUMBERS) for record in records]


def norm_of(step: Path) -> float:
    """The mean of the final norm's weights: it was 1 at first, and shrinks by learning rate x decay where it decays."""
    return by_dcp(step)["model.norm.weight"].mean().item()


def test_an_older_checkpoint_resumes_to_the_bit(gone_on: tuple[Path, Logged], tmp_path: Path) -> None:
    """The run that goes on from it is the run that goes on from the same state with a plan, bit for bit."""
    older, records = gone_on
    newer = tmp_path / "newer/checkpoint/step-2"
    shutil.copytree(older, newer)
    (newer / "plan.json").write_bytes(plan.parse_metadata((older / ".metadata").read_bytes()).as_json())
    (newer / ".metadata").write_bytes(b"not opened")
    reseal_manifest(newer)
    assert records == resumed(newer, 2)
    last = older.with_name("step-5")
    assert (last / "plan.json").is_file(), "what is saved now has a plan"
    assert not same(by_dcp(last), by_dcp(older)), "it did train"
    assert same(by_dcp(last), by_dcp(newer.with_name("step-5")))


def test_a_run_that_goes_on_keeps_the_schedule_and_the_decay_that_it_was_started_with(
    gone_on: tuple[Path, Logged], tmp_path: Path
) -> None:
    """Their defaults have changed since; the next start, from a checkpoint of today, keeps them too."""
    older = shutil.copytree(gone_on[0].parents[1], tmp_path / "older") / "checkpoint/step-2"
    for found, then in zip(gone_on[1], THEN, strict=True):
        assert found == pytest.approx(then, rel=1e-5)
        assert found[2] == then[2]
    assert norm_of(older.with_name("step-5")) == pytest.approx(NORM_THEN, abs=1e-5)
    records = train(older.parents[1], 1, *GIVEN[:2], "--training.steps=6", file=str(OLDER / "tiny.toml"))
    assert records[-1]["lr"] == pytest.approx(8e-4 / 6, rel=1e-12)
    extra = folders.newest_extra(older.parent)
    assert extra is not None
    assert (extra["config"]["lr_scheduler"]["variant"], extra["train_state"]["step"]) == ("early_decay", 6)
    assert extra["config"]["optimizer"]["decay_norms_and_biases"] is False


def test_keys_that_are_set_win_over_what_the_run_was_started_with(older: Path) -> None:
    rates = [numbers[2] for numbers in resumed(older, 2, *TODAY)]
    assert rates == pytest.approx([8e-4 * 4 / 5, 8e-4 * 3 / 5, 8e-4 * 2 / 5], rel=1e-12)
    assert norm_of(older.with_name("step-5")) < NORM_THEN - 1e-4


def test_a_run_that_goes_on_elsewhere_keeps_them_too(older: Path, tmp_path: Path) -> None:
    new = ("--checkpoint.initial_load_path", str(older), "--checkpoint.no_initial_load_model_only")
    found = trained(tmp_path / "new", 2, *new)
    assert [numbers[2] for numbers in found] == [numbers[2] for numbers in THEN]
    assert norm_of(tmp_path / "new/checkpoint/step-5") == pytest.approx(NORM_THEN, abs=1e-5)


def test_the_dry_run_says_what_a_run_that_goes_on_keeps(older: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*GIVEN, "--job.dump_folder", str(older.parents[1])]
    environ = {"CONFIG_FILE": str(OLDER / "tiny.toml"), "NGPU": "2", "DRY_RUN": "1"}
    assert launch(argv, environ) == 0
    output = " ".join(capfd.readouterr().out.split())
    kept = f"the value that the run in {older.parent} was started with"
    assert f'lr_scheduler.variant stays "early_decay", {kept}' in output
    assert f"optimizer.decay_norms_and_biases stays false, {kept}" in output
    assert launch([*argv, *TODAY], environ) == 0
    output = capfd.readouterr().out
    assert "early" not in output
    assert "decay_norms_and_biases stays" not in output


def test_stock_dcp_reads_what_is_saved_on_two_ranks(gone_on: tuple[Path, Logged]) -> None:
    last = gone_on[0].with_name("step-5")
    ours = empty(last)
    load_tensors(last, ours, None, facts=folders.read_checkpoint(last).files)
    assert same(ours, by_dcp(last))
    written = plan.parse_plan((last / "plan.json").read_bytes())
    assert written.tensors == plan.parse_metadata((last / ".metadata").read_bytes()).tensors
    assert "plan.json" in folders.read_checkpoint(last).files


def refusals(place: str, flag: str, names: list[str]) -> list[str]:
    """On each rank: what a load of each crafted checkpoint tells, on a resume and by `initial_load_path`."""
    group = dist.new_group(backend="gloo")
    outcomes = []
    for name in names:
        step = Path(place, name, "step-8")
        for section, run in (
            (Checkpoint(enable=True), step.parent),
            (Checkpoint(enable=True, initial_load_path=str(step)), Path(place, "new")),
        ):
            manager = CheckpointManager(section, run, group)
            weights = Weights(0)
            try:
                manager.load(manager.find(), {"model": weights})
            except Exception as error:  # noqa: BLE001 (its kind is looked at)
                outcomes.append(f"{type(error).__name__}: {error}")
            else:
                outcomes.append("loaded")
            assert not os.path.exists(flag)
    return outcomes


def test_crafted_checkpoints_are_refused_alike_on_all_ranks(tmp_path: Path) -> None:
    CheckpointManager(Checkpoint(enable=True), tmp_path).save(8, {"model": Weights(8)}, {})
    for name, attack in ATTACKS.items():
        step = tmp_path / name / "step-8"
        shutil.copytree(tmp_path / "step-8", step)
        attack(step, tmp_path / "flag")
        reseal_manifest(step)
    first, second = run_ranks(refusals, 2, str(tmp_path), str(tmp_path / "flag"), list(ATTACKS))
    assert not (tmp_path / "flag").exists()
    assert len(first) == 2 * len(ATTACKS)
    for one, other in zip(first, second, strict=True):
        assert one.startswith(("CheckpointError: ", "UserError: "))
        assert one == other
        assert "Traceback" not in one


def test_a_run_of_two_ranks_refuses_a_crafted_checkpoint(older: Path, tmp_path: Path) -> None:
    """The whole trainer, with a checkpoint that fits it but for what it would run."""
    for name in ("a_command_is_called", "second_unpickling_differs_in_a_later_protocol"):
        step = tmp_path / name / "checkpoint/step-2"
        shutil.copytree(older, step)
        ATTACKS[name](step, tmp_path / "flag")
        reseal_manifest(step)
        with pytest.raises(RankError, match=r"\.metadata is refused"):
            resumed(step, 2)
        assert not (tmp_path / "flag").exists()
