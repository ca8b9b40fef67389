"""The loggers of records: console, `metrics.jsonl`, TensorBoard, Weights & Biases. Each has `write` and `close`."""

from __future__ import annotations

import importlib.util
import io
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quadriga.config.run_spec import Folders
from quadriga.config.schema import Metrics
from quadriga.errors import Problem, UserError
from quadriga.log import is_logging_rank, logger
from quadriga.metrics.append import Appender
from quadriga.metrics.guarded import Guarded, Logger, WriteFailures
from quadriga.metrics.jsonl import JsonLines, Record
from quadriga.units import format_count, format_seconds

JSONL_NAME = "metrics.jsonl"


def build_loggers(
    section: Metrics,
    folders: Folders,
    *,
    rank: int,
    steps: int,
    first_step: int,
    title: str = "",
    config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    failures: WriteFailures | None = None,
) -> list[Logger]:
    """The loggers of this rank: the console on logging ranks, the files on rank 0, TensorBoard and W&B on every rank
    with `metrics.save_for_all_ranks`.

    Failed writes are recorded in `failures` and do not end the run.

    `steps`: the last step of the run; `first_step`: the first one of this attempt; `title` and `config` (the whole
    configuration as plain data) are for W&B. Raises UserError if W&B is requested, but not available.
    """
    loggers: list[Logger] = []
    failures = failures or WriteFailures(section.on_write_failure == "stop")
    place = f"rank_{rank}" if section.save_for_all_ranks else ""
    writes_curves = rank == 0 or section.save_for_all_ranks
    if section.enable_wandb and writes_curves:  # first, because only it may raise, and no file must be open then
        loggers.append(WeightsAndBiases(Path(folders.dump), place, title, config or {}))
    if section.enable_tensorboard and writes_curves:
        curves_folder = Path(folders.tensorboard, place)
        loggers.append(Guarded(lambda: TensorBoard(curves_folder, first_step), str(curves_folder), failures))
    if rank == 0:
        lines = Path(folders.dump, JSONL_NAME)
        loggers.append(Guarded(lambda: JsonLines(lines), str(lines), failures))
    if is_logging_rank(environ):
        loggers.append(Console(steps, colour=_wants_colour(section, environ)))
    return loggers[::-1]


def _wants_colour(section: Metrics, environ: Mapping[str, str]) -> bool:
    return sys.stderr.isatty() and not section.disable_color_printing and not environ.get("NO_COLOR")


class Console:
    """Writes one aligned line per record to standard error, through the logger of the run."""

    PLAIN, BOLD, DIM, RED, GREEN, YELLOW, BLUE, CYAN = "0", "1", "2", "31", "32", "33", "34", "36"

    def __init__(self, steps: int, colour: bool) -> None:
        self._steps, self._colour = steps, colour
        self._width = len(str(steps))

    def write(self, record: Record) -> None:
        columns = self._validation(record) if record["kind"] == "validation" else self._train(record)
        logger.info("  ".join(self._paint(text, style) for text, style in columns), extra={"as_it_is": True})

    def close(self) -> None:
        pass

    def _train(self, record: Record) -> list[tuple[str, str]]:
        columns = [
            (f"step {record['step']:>{self._width}}/{self._steps}", self.BOLD),
            (f"loss {record['loss']:8.5f}", self.GREEN),
            (f"grad norm {record['grad_norm']:8.4f}", self.YELLOW),
            (f"memory {_memory_used(record)}", self.CYAN),
            (f"{record['tokens_per_second_per_device']:>9,.0f} tok/s/device", self.BLUE),
            (f"{record['tflops']:7.2f} TFLOP/s", self.PLAIN),
        ]
        if record["mfu"] is not None:
            narrow = record["mfu_bfloat16"]
            of_bfloat16 = f" ({100 * narrow:4.1f}% of bfloat16)" if narrow is not None else ""
            columns.append((f"MFU {100 * record['mfu']:5.1f}%{of_bfloat16}", self.BOLD))
        waits = self.RED if record["data_wait_share"] > 0.05 else self.DIM
        columns.append((f"data wait {100 * record['data_wait_share']:4.1f}%", waits))
        columns.append((f"left {format_seconds(record['eta_seconds'])}", self.DIM))
        return columns

    def _validation(self, record: Record) -> list[tuple[str, str]]:
        return [
            (f"step {record['step']:>{self._width}}/{self._steps}", self.BOLD),
            (" ".join(filter(None, ("validation loss", record.get("set"), f"{record['loss']:.5f}"))), self.GREEN),
            (f"over {format_count(record['tokens'])} tokens in {format_seconds(record['seconds'])}", self.DIM),
        ]

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._colour and style != self.PLAIN else text


def _memory_used(record: Record) -> str:
    """The peak of reserved memory of a device, or the resident set of a CPU process."""
    for amount, share in (("memory_reserved_gib", "memory_reserved_percent"), ("memory_resident_gib", "")):
        if amount in record:
            percent = f" ({record[share]:.0f}%)" if share else ""
            return f"{record[amount]:6.2f} GiB{percent}"
    return "unknown"


# The metric names of torchtitan, for existing dashboards: (name, key of the record, factor).
CURVES: Sequence[tuple[str, str, float]] = (
    ("loss_metrics/global_avg_loss", "loss", 1),
    ("loss_metrics/global_max_loss", "max_loss", 1),
    ("grad_norm", "grad_norm", 1),
    ("lr", "lr", 1),
    ("n_tokens_seen", "tokens_seen", 1),
    ("throughput(tps)", "tokens_per_second_per_device", 1),
    ("tflops", "tflops", 1),
    ("mfu(%)", "mfu", 100),
    ("mfu_bfloat16(%)", "mfu_bfloat16", 100),
    ("time_metrics/end_to_end(s)", "step_seconds", 1),
    ("time_metrics/data_loading(s)", "data_wait", 1),
    ("time_metrics/data_loading(%)", "data_wait_share", 100),
    ("memory/max_active(GiB)", "memory_active_gib", 1),
    ("memory/max_active(%)", "memory_active_percent", 1),
    ("memory/max_reserved(GiB)", "memory_reserved_gib", 1),
    ("memory/max_reserved(%)", "memory_reserved_percent", 1),
    ("memory/num_alloc_retries", "memory_alloc_retries", 1),
    ("memory/num_ooms", "memory_ooms", 1),
    ("memory/resident(GiB)", "memory_resident_gib", 1),
    ("memory/max_resident(GiB)", "memory_peak_gib", 1),
)
VALIDATION_CURVES: Sequence[tuple[str, str, float]] = (
    ("validation_metrics/loss", "loss", 1),
    ("validation_metrics/throughput(tps)", "tokens_per_second", 1),
)


def curves_of_record(record: Record) -> dict[str, float]:
    """The values of a record under these metric names; None and missing values are left out."""
    names = VALIDATION_CURVES if record["kind"] == "validation" else CURVES
    curves = {name: record[key] * factor for name, key, factor in names if record.get(key) is not None}
    if label := record.get("set"):
        curves = {name.replace("/", f"/{label}/", 1): value for name, value in curves.items()}
    for count in ("tokens", "epochs"):
        counts = record.get(f"source_{count}", {})
        curves |= {f"sources/{source}/{count}": value for source, value in counts.items()}
    return curves


class TensorBoard:
    """Writes event files in `folder`. After a resume the curves continue: a marker discards older events from
    `first_step` on. Raises OSError if the file cannot be written. Torch's SummaryWriter is not used: it writes in its
    own thread, whose errors appear elsewhere, and it blocks forever after that thread has ended."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # These imports take a quarter of a second, which only runs with TensorBoard need.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2.Event, summary_pb2.Summary, RecordWriter
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appender(folder / name)
        begin = [self._event(wall_time=time.time(), file_version="brain.Event:2")]
        if first_step > 1:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            begin.append(self._event(wall_time=time.time(), step=first_step, session_log=start))
        try:
            self._append(begin)
        except OSError:
            self.close()
            raise

    def write(self, record: Record) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in curves_of_record(record).items()]
        when = {"wall_time": record["time"], "step": record["step"]}
        self._append([self._event(**when, summary=self._summary(value=[value])) for value in values])

    def close(self) -> None:
        self._file.close()

    def _append(self, events: Sequence[Any]) -> None:
        buffer = io.BytesIO()
        records = self._records(buffer)
        for event in events:
            records.write(event.SerializeToString())
        self._file.write(buffer.getvalue())  # completely or not at all, because readers stop at an incomplete record


class WeightsAndBiases:
    """A run of the package `wandb`, whose own variables (WANDB_PROJECT, WANDB_MODE ...) apply. A resumed run continues
    under the same id, which is stored in `wandb_id` in the run folder."""

    def __init__(self, folder: Path, place: str, title: str, config: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(_wandb_problem("the package wandb is not installed", "pip install wandb, or set it false"))
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "-".join(filter(None, ("wandb_id", place)))
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "quadriga"),
                dir=str(folder),
                id=known,
                resume="allow" if known else None,
                name=" ".join(filter(None, (title, place))) or None,
                config=dict(config),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            how = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline to write to the run folder only"
            raise UserError(_wandb_problem(f"Weights & Biases did not start: {error}", how)) from error
        try:
            id_file.write_text(self._run.id + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written (%s): a resume will start a new W&B run", id_file, error.strerror)

    def write(self, record: Record) -> None:
        self._run.log(curves_of_record(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _wandb_problem(what: str, fix: str) -> Problem:
    return Problem(where="metrics.enable_wandb", value="true", what=what, fix=fix)
