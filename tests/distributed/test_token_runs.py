"""Whole runs on token files: killed and resumed on another number of ranks, and stopped by ids that cannot be used."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, largest_difference, one_rank, train

from quadriga.checkpoint.folder import find_complete
from quadriga.cli.arguments import run_from_file
from quadriga.cli.main import main
from quadriga.config.schema import Dataloader
from quadriga.data.token_loader import build_token_loader
from quadriga.errors import UserError
from quadriga.metrics.documents import format_documents, read_documents
from quadriga.metrics.jsonl import read_metrics

STEPS, KILLED = 8, 7
EOS = 319


def write_ids(path: Path, count: int) -> Path:
    """Ids below 320 as nanoGPT writes them, in documents of about 20 ids."""
    ids = np.random.default_rng(5).integers(0, EOS, count).astype("<u2")
    ids[::20] = EOS
    ids.tofile(path)
    return path


def keys(tmp_path: Path, *more: str) -> list[str]:
    ids = write_ids(tmp_path / "ids.bin", 1100)
    argv = [*TINY, "--training.dataset=tokens", f"--training.dataset_path={ids}", "--training.token_dtype=uint16"]
    argv += [f"--training.token_eos_id={EOS}", "--metrics.log_documents", "--checkpoint.enable"]
    return [*argv, "--checkpoint.interval=2", f"--training.steps={STEPS}", *more]


def killed_rank(argv: list[str]) -> int:
    """A rank that is killed after step `KILLED`; the last save is that of the step before."""
    from quadriga.train.checks import Checks

    after_step = Checks.after_step

    def kill_after_step(self, metrics, record):
        after_step(self, metrics, record)
        if metrics.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    Checks.after_step = kill_after_step
    return one_rank(argv)


@pytest.mark.more
def test_a_killed_run_goes_on_with_other_ranks_as_if_nothing_had_been(tmp_path):
    validation = (
        "--validation.enable",
        "--validation.dataset=tokens",
        f"--validation.dataset_path={tmp_path}/held.bin",
    )
    write_ids(tmp_path / "held.bin", 500)
    more = (*validation, "--validation.freq=4", "--validation.seq_len=32", "--validation.local_batch_size=2")
    argv = keys(tmp_path, *more, "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")
    straight = train(tmp_path / "straight", 2, *argv)
    expected = read_documents(tmp_path / "straight")
    assert [list(rows) for rows in expected.values()] == [list(range(8))] * STEPS
    epochs = {name.partition(":")[0] for rows in expected.values() for names in rows.values() for name in names}
    assert epochs == {"0", "1"}, "the run reads into a second epoch"

    folder = tmp_path / "killed"
    with pytest.raises(RankError):
        run_ranks(killed_rank, 2, ["--job.config_file", DEBUG_FILE, f"--job.dump_folder={folder}", *argv], backend=None)
    assert find_complete(folder / "checkpoint").step == KILLED - 1
    resumed = train(folder, 1, *argv)
    assert read_documents(folder) == expected
    assert [record["attempt"] for record in resumed] == [1] * (KILLED - 1) + [2] * (STEPS - KILLED + 1)
    assert largest_difference(resumed, straight, "loss") < 1e-5

    exported = folder / f"checkpoint/step-{STEPS}-hf"
    assert not list(exported.glob("tokenizer*")), "the built-in tokenizer does not belong to the ids"
    config = json.loads((exported / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, EOS)


@pytest.mark.more
def test_a_killed_run_on_shards_goes_on_with_other_ranks(tmp_path):
    """On shards of `quadriga tokenize`, killed on two ranks and resumed on one, compared with a loader alone."""
    lines = [json.dumps({"text": f"{number} " * (1 + number % 30)}) for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    out = str(tmp_path / "ids")
    how = ["--tokenizer", "builtin:bytes", "--shard-tokens", "900"]
    assert main(["tokenize", str(tmp_path / "texts.jsonl"), out, *how]) == 0
    assert len(list((tmp_path / "ids").glob("*.bin"))) > 2
    argv = [*TINY, "--training.dataset=tokens", f"--training.dataset_path={out}", "--metrics.log_documents"]
    argv += ["--checkpoint.enable", "--checkpoint.interval=2", f"--training.steps={STEPS}"]
    folder = tmp_path / "run"
    with pytest.raises(RankError):
        run_ranks(killed_rank, 2, ["--job.config_file", DEBUG_FILE, f"--job.dump_folder={folder}", *argv], backend=None)
    assert find_complete(folder / "checkpoint").step == KILLED - 1
    resumed = train(folder, 1, *argv)
    assert [record["attempt"] for record in resumed] == [1] * (KILLED - 1) + [2] * (STEPS - KILLED + 1)
    run = run_from_file(str(folder / "config.toml"), 1)
    order = {"seed": run.spec.seed, "seq_len": 32, "global_batch_size": 8, "rows": range(8)}
    loader = build_token_loader(run.config.training.token_keys, 320, dataloader=Dataloader(), **order)
    expected = {step: format_documents(loader.next().documents, 0) for step in range(1, STEPS + 1)}
    loader.close()
    logged = read_documents(folder)
    assert {step: {str(row): names for row, names in rows.items()} for step, rows in logged.items()} == expected


def refused(argv: list[str]) -> tuple[int, str]:
    """A run whose token file is cut after the start: by the second rank, before its third step."""
    from quadriga.data.token_loader import TokenLoader

    real = TokenLoader.next

    def cut_then_next(self):
        cut_then_next.calls += 1
        if cut_then_next.calls == 3 and os.environ["RANK"] == "1":
            path = next(arg.partition("=")[2] for arg in argv if arg.startswith("--training.dataset_path="))
            os.truncate(path, 1000)
        return real(self)

    cut_then_next.calls = 0
    TokenLoader.next = cut_then_next
    try:
        return one_rank(argv), ""
    except UserError as error:
        return error.exit_code, error.report


def test_a_file_that_is_cut_ends_the_run_after_a_whole_step(tmp_path):
    argv = keys(tmp_path, "--training.dataloader.prefetch_factor=1", f"--job.dump_folder={tmp_path / 'run'}")
    ends = run_ranks(refused, 2, ["--job.config_file", DEBUG_FILE, *argv], backend=None)
    assert {code for code, _ in ends} == {2}
    (report,) = {report for _, report in ends}
    assert "ids.bin" in report
    done = [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert find_complete(tmp_path / "run/checkpoint").step == done[-1] < STEPS
