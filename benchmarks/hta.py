"""Runs every analysis of HolisticTraceAnalysis on the traces of a run of two ranks over gloo.

    python -m venv hta && hta/bin/pip install HolisticTraceAnalysis==0.5.0
    python benchmarks/hta.py --hta-python hta/bin/python               # two minutes on 2 cores
    python benchmarks/hta.py --hta-python hta/bin/python --run FOLDER  # an existing run, also of a GPU

It needs pandas, plotly and more, so it is not a dependency of Quadriga and runs in a separate environment. Claim: it
opens the traces of all ranks and finds the profiled steps. The result of each analysis is recorded unchanged. Most of
them concern GPU kernels, which a CPU trace does not have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, child_environment, command_line, met_or_missed, save, text_table

from quadriga.analysis.ccl_bench.folder import newest_traces, read_rank_summary

CLAIM = "HolisticTraceAnalysis opens the traces of all ranks and finds their profiled steps"
RUN = ("--training.steps=12", "--profiling.profile_freq=12", "--profiling.profiler_active=5", "--checkpoint.no_enable")
CHILD = """
import importlib.metadata, json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis
folder, calls = sys.argv[1], json.loads(sys.argv[2])
analysis = TraceAnalysis(trace_dir=folder)
ranks = sorted(analysis.t.get_ranks())
found = {"ranks": ranks, "events": [len(analysis.t.get_trace(rank)) for rank in ranks]}
found["steps"] = [int(step) for step in analysis.get_profiler_steps()]
found["versions"] = {name: importlib.metadata.version(name) for name in ("HolisticTraceAnalysis", "pandas")}
def shown(value):
    if hasattr(value, "to_dict") and hasattr(value, "empty"):
        return "empty" if value.empty else json.loads(value.head(5).to_json(orient="records"))
    if isinstance(value, dict):
        return {str(key): shown(inner) for key, inner in value.items()} or "empty"
    if isinstance(value, (list, tuple)):
        return [shown(inner) for inner in value[:5]] or "empty"
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)[:200]
found["analyses"] = {}
for name, arguments in calls.items():
    try:
        found["analyses"][name] = {"answer": shown(getattr(analysis, name)(**arguments))}
    except Exception as error:
        found["analyses"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
print(json.dumps(found))
"""
NO_PLOTS: dict[str, Any] = {"visualize": False}
CALLS: dict[str, dict[str, Any]] = {
    "get_temporal_breakdown": NO_PLOTS,
    "get_idle_time_breakdown": NO_PLOTS,
    "get_gpu_kernel_breakdown": NO_PLOTS,
    "get_comm_comp_overlap": NO_PLOTS,
    "get_cuda_kernel_launch_stats": NO_PLOTS,
    "get_aten_op_kernels_and_delay": {},
    "get_memory_bw_summary": {},
    "get_queue_length_summary": {},
    "get_potential_stragglers": {},
    "get_gpu_kernels_with_user_annotations": {"rank": 0},
    "critical_path_analysis": {"rank": 0, "annotation": "ProfilerStep", "instance_id": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--hta-python", required=True, help="the Python of an environment with HolisticTraceAnalysis")
    parser.add_argument("--run", type=Path, help="a run folder with traces (default: train one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or train_run(Path(scratch) / "run")
        _, traces = newest_traces(folder)
        ours = sorted(read_rank_summary(0, traces[0]).steps)
        found = run_analyses(options.hta_python, traces[0].parent)
    met = found["ranks"] == sorted(traces) and set(found["steps"]) <= set(ours) and len(found["steps"]) >= len(ours) - 1
    rows = [[name, answer.get("error") or answer["answer"]] for name, answer in found["analyses"].items()]
    print(text_table(["analysis", "answer"], [[name, str(answer)[:90]] for name, answer in rows]))
    print(f"\nranks {found['ranks']}, steps {found['steps']} of the profiled {ours}: {met_or_missed(met)}")
    save("hta", {"our_steps": ours, **found}, command=command_line(), claim=CLAIM)
    return 0 if met else 1


def train_run(folder: Path) -> Path:
    command = [sys.executable, "-m", "quadriga.cli", "train", str(ROOT / "configs/debug/debug.toml"), "--ngpu", "2"]
    command += ["--job.dump_folder", str(folder), *RUN]
    subprocess.run(command, env=child_environment(), check=True, stdout=subprocess.DEVNULL)
    return folder


def run_analyses(python: str, folder: Path) -> dict[str, Any]:
    command = [python, "-c", CHILD, str(folder), json.dumps(CALLS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
