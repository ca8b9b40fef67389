"""Run folders made by hand, as a run leaves them, and what a reader of traces would say of them. For tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quadriga.config import JobConfig, to_toml
from quadriga.errors import Problem, UserError

START = 1_700_000_000.0
ENVIRONMENT = {
    "quadriga": "1.0",
    "git": {"commit": "abc", "changed": False},
    "command": ["-m"],
    "python": "3.11.7",
    "libraries": {"torch": "2.13.0", "numpy": "2.1"},
    "cuda": None,
    "nccl": None,
    "devices": [],
    "cpu": {"architecture": "x86_64", "cores": 2, "threads_per_rank": 1},
    "host": "one",
    "system": "Linux",
    "world_size": 2,
    "backend": "gloo",
    "environment": {"COMM_BACKEND": "gloo", "OMP_NUM_THREADS": "1"},
}
TABLES: dict[str, dict[str, Any]] = {
    "training": {"steps": 20, "seq_len": 64},
    "metrics": {"log_freq": 1},
    "comm": {"backend": "gloo"},
}


def make_run(
    folder: Path,
    seconds: float | Sequence[float] = 0.1,
    *,
    keys: dict[str, Any] | None = None,
    begins: float = 0.0,
    memory: float = 1.5,
    loss: Callable[[int], float] = lambda step: 5.0 / step,
    environment: dict[str, Any] | None = None,
    steps: int | None = None,
    tokens: int = 512,
    config: JobConfig | None = None,
) -> Path:
    """A finished run. `seconds`: of a step, of each or of all; `keys`: of the configuration, by `section.key`;
    `begins`: seconds after the first run of all; `environment`: what is other there; `steps`: where it ended early;
    `config`: the whole configuration, in the place of `keys`."""
    tables = {name: dict(values) for name, values in TABLES.items()}
    for key, value in (keys or {}).items():
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = value
    config = config or JobConfig.model_validate({**tables, "job": {"dump_folder": str(folder)}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, **(environment or {})}))
    count = steps or config.training.steps
    each = [seconds] * count if isinstance(seconds, float) else list(seconds)
    now, records = START + begins, []
    for step, taken in enumerate(each, start=1):
        now += taken
        if step % config.metrics.log_freq and step not in (1, count):
            continue
        records.append(
            {
                "kind": "train",
                "step": step,
                "attempt": 1,
                "time": now,
                "loss": loss(step),
                "step_seconds": taken,
                "tokens_seen": step * tokens,
                "tokens_per_second": tokens / taken,
                "tflops": 0.1 / taken,
                "mfu": None,
                "data_wait_share": 0.01,
                "memory_peak_gib": memory * min(step, 10) / 10,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    end = {"event": "end", "time": now, "attempt": 1, "rank": 0, "step": count, "code": 0}
    (folder / "events.jsonl").write_text(json.dumps(end) + "\n")
    return folder


def make_setting(
    folder: Path, seconds: Sequence[float], *, first: float = 0.0, apart: float = 100.0, **run: Any
) -> Path:
    """Repeats, one for each of `seconds`; the first begins at `first`, each further one `apart` later."""
    for number, each in enumerate(seconds):
        make_run(folder / f"repeat-{number + 1}", each, begins=first + number * apart, **run)
    return folder


def make_pair(folder: Path, ours: Sequence[float], others: Sequence[float], **other: Any) -> list[Path]:
    """Two settings whose runs took turns, the second with `other`; each first in its turn."""
    for number, (mine, theirs) in enumerate(zip(ours, others, strict=True)):
        begins = 200.0 * number
        swap = 100.0 * (number % 2)
        make_run(folder / "a" / f"repeat-{number + 1}", mine, begins=begins + swap)
        make_run(folder / "b" / f"repeat-{number + 1}", theirs, begins=begins + 100.0 - swap, **other)
    return [folder / "a", folder / "b"]


def collective(
    axis: str, backend: str | None, amount: float | None, exposed: float | None = 0.01, by: str = "linkage"
) -> Any:
    return {
        "axis": axis,
        "collective": "all_gather",
        "backend": backend,
        "found_by": by,
        "bytes_a_step": amount,
        "exposed_s_a_step": exposed,
    }


def analysis(
    *collectives: dict[str, Any], ranks: Sequence[dict[str, float | None]] = (), kernels: Sequence[str] = ()
) -> dict[str, Any]:
    """The part of an analysis of traces that comparisons read."""
    usual: dict[str, float | None] = {
        "seconds": 0.12,
        "compute_s": 0.08,
        "communication_s": 0.04,
        "exposed_communication_s": 0.03,
        "memcpy_s": None,
        "host_idle_s": 0.005,
        "data_wait_s": 0.001,
    }
    means = ranks or ({}, {})
    by_rank = [{"rank": rank, "mean": {**usual, **mean}, "steps": []} for rank, mean in enumerate(means)]
    top = [{"name": name, "seconds_a_step": 0.01, "share": 0.1, "calls_a_step": 1} for name in kernels]
    return {
        "format": "quadriga-trace-1",
        "by_rank": by_rank,
        "collectives": list(collectives),
        "kernels": {"families": [], "blocks": [], "top": top},
    }


def no_traces(folder: Path) -> dict[str, Any]:
    raise UserError(Problem("RUN", "there are no traces", str(folder)))
