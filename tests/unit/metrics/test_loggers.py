"""Each logger writes to the real thing, and what it wrote is read back by that thing's own reader."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quadriga.config.run_spec import Folders
from quadriga.config.schema import Metrics
from quadriga.errors import UserError
from quadriga.metrics.jsonl import read_metrics
from quadriga.metrics.loggers import Console, build_loggers, curves_of_record
from quadriga.metrics.meter import Meter
from quadriga.metrics.step_metrics import StepMetrics


def folders(dump: Path) -> Folders:
    names = ("checkpoint", "tb", "profile_trace", "memory_snapshot", "comm_traces")
    return Folders(str(dump), *(str(dump / name) for name in names))


def records(steps: range, attempt: int = 1, loss: float = 2.0, sources: dict | None = None) -> list[dict]:
    meter = Meter(
        Metrics(log_freq=1),
        steps=200,
        first_step=steps.start,
        tokens_seen=0,
        attempt=attempt,
        devices=1,
        flops_per_token=1e9,
        peak_flops=1e12,
        device=torch.device("cpu"),
        clock=itertools.count(start=0.0, step=0.25).__next__,
    )
    more = {"max_loss": torch.tensor(9.0), "skipped": torch.tensor(0), "verdict": torch.zeros(5), "sources": sources}
    metrics = (
        StepMetrics(step, torch.tensor(loss + step / 100), torch.tensor(0.5), 1e-3, 64 * step, 0.01, **more)
        for step in steps
    )
    return [record for one in metrics if (record := meter.record(one)) is not None]


def build(section: Metrics, dump: Path, rank: int = 0, first_step: int = 1):
    environ = {"RANK": str(rank)}
    return build_loggers(section, folders(dump), rank=rank, steps=200, first_step=first_step, environ=environ)


def write(loggers, some: list[dict]) -> None:
    for record in some:
        for one in loggers:
            one.write(record)
    for one in loggers:
        one.close()


def test_a_plain_run_has_a_console_and_metrics_jsonl(tmp_path, lines):
    some = records(range(1, 4))
    write(build(Metrics(), tmp_path), some)
    assert read_metrics(tmp_path / "metrics.jsonl") == some
    assert not (tmp_path / "tb").exists()
    assert len(lines) == 3
    for part in ("step   1/200", "loss  2.01000", "grad norm", "GiB", "tok/s/device", "TFLOP/s", "MFU", "wait", "left"):
        assert part in lines[0]
    assert len({line.index("TFLOP/s") for line in lines}) == 1, "columns stand under one another"


def test_an_unknown_peak_shows_no_mfu_and_colour_is_for_terminals(lines):
    (record,) = records(range(1, 2))
    Console(200, colour=True).write({**record, "mfu": None})
    Console(200, colour=False).write(record)
    coloured, plain = lines
    assert "MFU" not in coloured
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain


def test_a_run_in_float32_shows_its_share_of_the_peak_in_bfloat16(lines):
    (record,) = records(range(1, 2))
    for share in (0.0373, None):
        Console(200, colour=False).write({**record, "mfu": 0.551, "mfu_bfloat16": share})
    assert "MFU  55.1% ( 3.7% of bfloat16)" in lines[0]
    assert "MFU  55.1%  data wait" in lines[1]
    assert curves_of_record({**record, "mfu_bfloat16": 0.0373})["mfu_bfloat16(%)"] == pytest.approx(3.73)


def test_other_ranks_write_nothing_unless_asked(tmp_path):
    assert build(Metrics(enable_tensorboard=True), tmp_path, rank=1) == []
    write(build(Metrics(enable_tensorboard=True, save_for_all_ranks=True), tmp_path, rank=1), records(range(1, 3)))
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["rank_1"]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_reads_one_curve_after_a_resume(tmp_path):
    section = Metrics(enable_tensorboard=True)
    write(build(section, tmp_path), records(range(1, 31)))
    write(build(section, tmp_path, first_step=21), records(range(21, 26), attempt=2, loss=3.0))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("loss_metrics/global_avg_loss")}
    assert sorted(curve) == list(range(1, 26))
    assert curve[20] == pytest.approx(2.20)
    assert curve[21] == pytest.approx(3.21)
    assert {
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "throughput(tps)",
        "mfu(%)",
        "time_metrics/end_to_end(s)",
        "n_tokens_seen",
    } <= set(events.Tags()["scalars"])


WANDB_RUN = """
import json, sys
from pathlib import Path
from quadriga.metrics.loggers import WeightsAndBiases
for title in ("first", "second"):  # the second goes on under the id of the first
    run = WeightsAndBiases(Path(sys.argv[1]), "", title, {"training": {"steps": 200}})
    for record in json.loads(sys.argv[2]):
        run.write(record)
    run.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is optional")
def test_wandb_offline(tmp_path):
    environ = {
        "PATH": "/usr/bin:/bin",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
    }
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path), json.dumps(records(range(1, 3)))]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "wandb_id").read_text().strip()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert written
    assert all(b"loss_metrics/global_avg_loss" in path.read_bytes() for path in written)


def test_wandb_that_is_not_installed_is_reported(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match="pip install wandb"):
        build(Metrics(enable_wandb=True), tmp_path)


def test_records_are_json():
    (record,) = records(range(1, 2))
    assert json.loads(json.dumps(record)) == record


def test_sources_of_a_mixture_are_in_the_record_and_in_the_curves(tmp_path):
    counts = {"web": {"tokens": 640, "epochs": 0.5}, "books": {"tokens": 64, "epochs": 2}}
    (record,) = records(range(1, 2), sources=counts)
    (plain,) = records(range(1, 2))
    assert record["source_tokens"] == {"web": 640, "books": 64}
    assert record["source_epochs"] == {"web": 0.5, "books": 2}
    assert record.keys() - plain.keys() == {"source_tokens", "source_epochs"}
    write(build(Metrics(enable_tensorboard=True), tmp_path), [record])
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.value for event in events.Scalars("sources/web/epochs")] == [0.5]
    assert [event.value for event in events.Scalars("sources/books/tokens")] == [64]
