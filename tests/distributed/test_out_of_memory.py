"""A real lack of memory: the report says where it was met and what would help, and the code is 6."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from ranks import run_ranks
from training import DEBUG_FILE, TINY

from quadriga.metrics.events import read_events
from quadriga.resilience.processes import RECORDS, read_records

LARGE = (*TINY, "--model.vocab_size=8000", "--training.seq_len=512", "--training.local_batch_size=8")


def limited(folder: str, arguments: tuple[str, ...], step: int, estimated: bool = True) -> int:
    """The whole rank, which from `step` on may have 32 MiB more than it has then; `estimated`: keeps its estimate."""
    from quadriga.train import loop
    from quadriga.train.__main__ import main

    take_step = loop.train_step

    def train_step(state, step_config, mesh):
        if state.step + 1 == step:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (32 << 20)
            if not estimated:
                Path(folder, "estimate.json").unlink()
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return take_step(state, step_config, mesh)

    loop.train_step = train_step
    return main(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *arguments])


@pytest.mark.parametrize("estimated", [False, True], ids=["by-configuration", "by-estimate"])
def test_running_out_of_host_memory(estimated: bool, tmp_path: Path) -> None:
    run, records = tmp_path / "run", tmp_path / "records"
    records.mkdir()
    codes = run_ranks(
        *(limited, 1, str(run), (*LARGE, "--training.steps=4"), 2, estimated),
        backend=None,
        environ={RECORDS: str(records)},
    )
    assert codes == [6]
    record = read_records(records / "0")[0]
    assert (record.code, record.is_report) == (6, True)
    lines = record.details.splitlines()
    assert lines[0] == "rank 0 ran out of host memory in step 2, phase 'forward and backward'"
    assert re.fullmatch(r"    held       [\d.]+ [MG]iB by this process at its peak", lines[2])
    assert "allocate" in lines[3]
    helps = lines.index("What would help most:")
    if estimated:
        predicted = json.loads((run / "estimate.json").read_text())["if_memory_runs_out"]
        assert lines[helps + 1 : helps + 4] == [f"    {predicted[0]}", f"    {predicted[1]}", ""]
    else:
        assert "activation_checkpoint.mode=full" in lines[helps + 1]
        assert "training.loss_chunks=8" in lines[helps + 2]
    assert "Traceback" not in record.details
    faults = [event for event in read_events(run) if event["event"] == "fault"]
    assert [(event["step"], event["error"]) for event in faults] == [(1, lines[0])]
