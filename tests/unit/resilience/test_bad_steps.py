"""What is done about verdicts, without a run around it: when they are looked at, and what is said."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from quadriga.config.schema import Health as HealthSection
from quadriga.errors import EXIT_NOT_FINITE
from quadriga.metrics.events import EventLog, read_events
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience.bad_steps import MAX_SKIPPED_IN_A_ROW, BadSteps, CommonFault
from quadriga.resilience.health import FINE, NOT_FINITE, SPIKE, HealthMonitor, StepVerdict

NAN = float("nan")


class Run:
    """Steps as the loop hands them on; with the device's pace, of which the host learns at every tenth step."""

    def __init__(self, folder, waits: bool, **section) -> None:
        self.health = HealthMonitor(HealthSection(**section), waits=waits)
        model = torch.nn.Linear(2, 2)
        self.bad_steps = BadSteps(self.health, [model], EventLog(folder, 0, 1), str(folder), 4)
        self.step = 0

    def take(self, kind: int = FINE) -> None:
        self.step += 1
        self.health.skipped += kind != FINE
        verdict = StepVerdict(kind, NAN if kind == NOT_FINITE else 1.0, 1 if kind == NOT_FINITE else -1, 2.0, 0.5)
        loss = torch.tensor(NAN if kind == NOT_FINITE else 5.0)
        more = {
            "max_loss": loss,
            "skipped": self.health.skipped.clone(),
            "verdict": torch.tensor(verdict, dtype=torch.float64),
            "documents": (((0, 3, 17), (0, 3, 99)), ((1, 0, 0),)),
        }
        metrics = StepMetrics(self.step, loss, torch.tensor(1.5), 1e-3, 100, 0.0, **more)
        self.bad_steps.check(metrics, int(metrics.skipped) if self.step % 10 == 0 else None)


def skips(folder) -> list[int]:
    return [event["step"] for event in read_events(folder) if event["event"] == "skip"]


@pytest.mark.parametrize("waits", [True, False])
def test_each_bad_step_is_reported_once_whenever_the_host_learns_of_it(tmp_path, waits, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    run = Run(tmp_path, waits, non_finite="skip_step", spike="skip_step")
    kinds = {4: NOT_FINITE, 7: SPIKE, 20: SPIKE}
    for step in range(1, 26):
        run.take(kinds.get(step, FINE))
        assert skips(tmp_path) == [bad for bad in kinds if bad <= (step if waits else step // 10 * 10)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "step 4: the loss is nan" in lines[0]
    assert "not finite: the loss of rank 0\n" in lines[0]
    assert "not finite: the gradients held by rank 0; on rank 0 the first is bias" in lines[0]
    assert "the mean of the losses before is 2.0000, 6.0 standard deviations below" in lines[1]
    assert "(3 so far)" in lines[2]
    records = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in records] == [(4, "non_finite"), (7, "spike"), (20, "spike")]
    assert records[0]["rows"] == {"4": ["0:3:17", "0:3:99"], "5": ["1:0:0"]}


def test_a_save_is_preceded_by_a_look(tmp_path):
    run = Run(tmp_path, waits=False, non_finite="raise")
    for kind in (FINE, FINE, NOT_FINITE, FINE):
        run.take(kind)
    with pytest.raises(CommonFault, match="step 3: the loss is nan") as fault:
        run.bad_steps.check_pending()
    assert fault.value.exit_code == EXIT_NOT_FINITE
    run.bad_steps.check_pending()  # nothing is unseen any more


def test_each_kind_follows_its_own_policy(tmp_path):
    run = Run(tmp_path, waits=True, non_finite="skip_step", spike="raise")
    run.take(NOT_FINITE)
    with pytest.raises(CommonFault, match="--health"):
        run.take(SPIKE)


def test_a_run_that_only_skips_is_ended(tmp_path):
    run = Run(tmp_path, waits=True, non_finite="skip_step")
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        run.take(NOT_FINITE)
    run.take(FINE)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        run.take(NOT_FINITE)
    with pytest.raises(CommonFault, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped") as fault:
        run.take(NOT_FINITE)
    assert fault.value.exit_code == EXIT_NOT_FINITE
