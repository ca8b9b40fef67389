"""What is checked and recorded after every step, besides metrics: documents, bad steps, replicas of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.metrics.documents import DocumentLog
from quadriga.metrics.meter import Record
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.resilience.bad_steps import BadSteps
from quadriga.resilience.replica_checks import ReplicaCheck
from quadriga.train.bad_records import BadRecords


@dataclass(frozen=True)
class Checks:
    """The checks of one rank. `documents`: None if they are not logged, or another rank reads the same rows."""

    documents: DocumentLog | None
    bad_steps: BadSteps
    replicas: ReplicaCheck
    bad_records: BadRecords | None = None  # None if another rank reads the same rows

    def after_step(self, metrics: StepMetrics, record: Record | None) -> None:
        """`record`: the step's, if it has one. Raises CommonFault on all ranks if the run must stop."""
        if self.documents is not None:
            self.documents.write(metrics.step, metrics.documents)
        if self.bad_records is not None:
            self.bad_records.log_skipped(metrics.step, metrics.skipped_records)
        self.bad_steps.check(metrics, record["skipped_steps"] if record else None)
        if self.replicas.is_due(metrics.step):
            self.replicas.compare(metrics.step)

    def before_save(self) -> None:
        """Check pending steps before a save, so that a bad one stops the run first. Raises as `after_step`."""
        self.bad_steps.check_pending()

    def close(self) -> None:
        if self.documents is not None:
            self.documents.close()
