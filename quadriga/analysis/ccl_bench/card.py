"""CCL-Bench's workload card (version 1): its fields, reading and writing a card, and checks for known errors.

The schema is that of CCL-Bench's `workload_card_template.yaml`. Its figures depend on the card as much as on a trace:
`mfu` is (6 (num_params - num_params_embedding) + 12 num_layers num_heads head_dim seq_len) x batch_size x seq_len /
step time / (peak x total_count). So a wrong embedding size or a local batch gives a wrong row without any message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quadriga import limits
from quadriga.analysis.ccl_bench.folder import RankSummary, average_step_time, rank_files, without_ends
from quadriga.errors import Problem, UserError, shortened
from quadriga.hardware import find_device
from quadriga.reading import read_text
from quadriga.units import format_some

Card = dict[str, Any]
ARCH = "workload.model.model_arch"
PLAN = "Model-executor.model_plan_parallelization"
LIBRARY = "Model-executor.communication_library"
FIELDS = (
    *("version", "description", "hf_url", "trace_url", "contributor", "contact"),
    *(f"workload.model.{name}" for name in ("phase", "moe", "granularity", "model_family", "precision")),
    *("workload.model.epochs", "workload.model.iteration"),
    *(f"{ARCH}.{name}" for name in ("num_params", "num_params_embedding", "num_layers", "num_heads", "head_dim")),
    *(f"workload.data.{name}" for name in ("batch_size", "seq_len", "dataset")),
    *(f"workload.hardware.network_topo.{name}" for name in ("topology", "bandwidth_gbps")),
    *(f"workload.hardware.xpu_spec.{name}" for name in ("type", "model", "total_count", "count_per_node")),
    "workload.hardware.driver_version",
    *(f"Model-executor.framework.{name}" for name in ("name", "compiler_tool_selection")),
    *(f"{PLAN}.{name}" for name in ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep", "pp_mb")),
    *(f"{LIBRARY}.{name}" for name in ("name", "version", "env")),
    "Model-executor.protocol_selection",
    *("metric_source.traces", "metric_source.metrics_specific_trace"),
)
INFERENCE_FIELDS = ("workload.data.input_len", "workload.data.output_len")
MIN_STEPS = 5
MAX_FILES = 16  # CCL-Bench's tools sample from more files
TOLERANCE = 0.02  # relative, between two counts of tokens


def field_value(card: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `workload.data.batch_size`; None if there is none."""
    found: Any = card
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def card_file(place: Path) -> Path:
    """The file `place`, or the first `*.yaml` of a folder, which CCL-Bench's tools read. Raises UserError if none."""
    if place.is_file():
        return place
    found = sorted(place.glob("*.yaml")) or sorted(place.glob("*.yml"))
    if not found:
        what = "the folder has no card (*.yaml)" if place.is_dir() else "there is no such file or folder"
        raise UserError(Problem("FOLDER", what, str(place), allowed="a folder with a card, or a card"))
    return found[0]


def read_card(path: Path) -> Card:
    """The fields of a card. A value that is not a number, boolean, list or mapping is read as text.

    Raises UserError if the file is not YAML, not a mapping, or exceeds a limit.
    """
    text = read_text(path, limits.CCL_CARD_BYTES, what="card")
    try:
        card = _plain(yaml.load(text, Loader=_Plain))
    except RecursionError:
        raise UserError(Problem(shortened(path, 400), "the card cannot be read: it nests too deep")) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: invalid dates and numbers
        raise UserError(Problem(shortened(path, 400), f"the card cannot be read: {shortened(error, 300)}")) from None
    if not isinstance(card, dict):
        raise UserError(Problem(shortened(path, 400), "the file is not a card: it has no fields"))
    return card


class _Plain(yaml.SafeLoader):
    """YAML without references and tags: a few nested references can expand to more than the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not read in a card")
        event = self.peek_event()
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({event.tag}) are not read in a card")
        return super().compose_node(parent, index)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("a number of more than 64 bits")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def write_card(card: Card, path: Path) -> None:
    """Write a card as YAML, with the fields in the order of the template."""
    path.write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8")


def card_errors(card: Card, traces: Sequence[RankSummary], embeddings: Mapping[int, int]) -> list[str]:
    """Errors in a card, found from the card itself and the traces next to it. One message per error.

    `embeddings`: elements of the embedding table by parameters of the model, for known models.
    """
    found = [*_missing(card), *_embedding(card, traces, embeddings), *_batch(card, traces), *_utilization(card, traces)]
    return [*found, *_profiled(traces), *_bandwidth(card), *_backend(card), *_degrees(card)]


def layout_errors(folder: Path, card: Card) -> Iterator[str]:
    """Files of a folder that CCL-Bench's tools would not find, or misread. One message per error."""
    cards = [path.name for path in sorted(folder.glob("*.yaml"))]
    if len(cards) > 1:
        yield f"{len(cards)} cards ({format_some(cards)}): the tools read the one that the file system lists first"
    traces = set(rank_files(folder).values())
    others = [path.name for path in sorted(folder.glob("*.json")) if path not in traces]
    if others:
        yield f"the tools read every *.json as a trace, also {format_some(others)}"
    if hidden := [path for pattern in ("*_trace.json.gz", "*/**/*_trace.json*") for path in folder.glob(pattern)]:
        yield f"{len(hidden)} traces are compressed or in subfolders, which the tools do not read"
    if len(traces) > MAX_FILES:
        yield f"{len(traces)} traces: of more than {MAX_FILES}, the tools read a fixed random sample"
    total = field_value(card, "workload.hardware.xpu_spec.total_count")
    if traces and isinstance(total, int) and len(traces) != total:
        yield f"traces of {len(traces)} ranks, but total_count is {total}"
    listed = field_value(card, "metric_source.traces")
    if traces and "json" not in (listed if isinstance(listed, list) else [listed]):
        yield "metric_source.traces does not list `json`, so the tools do not read the traces"


def model_flops_utilization(card: Card, step_time: float | None) -> float | None:
    """CCL-Bench's `mfu`, a share of 1, from a card and a step time in seconds; None if a value for it is missing."""
    arch = [_number(card, f"{ARCH}.{name}") for name in ("num_params", "num_layers", "num_heads", "head_dim")]
    data = [_number(card, f"workload.data.{name}") for name in ("batch_size", "seq_len")]
    device = find_device(str(field_value(card, "workload.hardware.xpu_spec.model") or ""))
    total, peak = _number(card, "workload.hardware.xpu_spec.total_count"), device and device.peak_flops("bfloat16")
    if None in (*arch, *data, total, peak, step_time) or not step_time or not total or not peak:
        return None
    parameters, layers, heads, width = (figure or 0.0 for figure in arch)
    batch, length = (figure or 0.0 for figure in data)
    weights = parameters - (_number(card, f"{ARCH}.num_params_embedding") or 0.0)
    flops_per_token = 6 * weights + 12 * layers * heads * width * length
    return flops_per_token * batch * length / step_time / (peak * total)


def _missing(card: Card) -> Iterator[str]:
    fields = FIELDS + (INFERENCE_FIELDS if _is_inference(card) else ())
    values = {field: field_value(card, field) for field in fields}
    absent = [field for field, value in values.items() if value is None or (isinstance(value, list) and None in value)]
    if absent:
        yield f"{len(absent)} of {len(fields)} fields are missing or empty: {', '.join(absent)}"
    astray = [name for name in ("num_params", "num_layers", "head_dim") if field_value(card, f"workload.model.{name}")]
    if astray:
        yield f"{', '.join(astray)} are in workload.model, but `mfu` reads them from {ARCH}"


def _embedding(card: Card, traces: Sequence[RankSummary], embeddings: Mapping[int, int]) -> Iterator[str]:
    given, parameters = (_number(card, f"{ARCH}.{name}") for name in ("num_params_embedding", "num_params"))
    if given is None:
        return
    tables = [trace.table for trace in traces if trace.table] if field_value(card, f"{PLAN}.tp") in (None, 1) else []
    known = embeddings.get(int(parameters)) if parameters else None
    right, source = (known, "this model's") if known else (max(tables, default=None), "the trace's")
    if right and given != right:
        twice = ": the output layer, whose FLOP count, was included" if given == 2 * right else ""
        yield f"num_params_embedding is {given:,.0f}, {source} is {right:,} (vocabulary x width){twice}; `mfu` is wrong"
    elif not right and parameters and given >= parameters:
        yield f"num_params_embedding {given:,.0f} is not below num_params {parameters:,.0f}"


def _batch(card: Card, traces: Sequence[RankSummary]) -> Iterator[str]:
    batch, length = (_number(card, f"workload.data.{name}") for name in ("batch_size", "seq_len"))
    if not batch or not length or _is_inference(card):
        return
    rows = _degree(card, "dp_replicate") * _degree(card, "dp_shard")
    seen = max((trace.tokens for trace in traces if trace.tokens), default=None)
    if seen is None:
        scope = field_value(card, "workload.data.batch_size_scope")
        if scope != "global" and rows > 1:
            given = f"batch_size_scope is `{shortened(scope)}`" if scope else "batch_size_scope is missing"
            yield f"batch_size {batch:g} cannot be checked against the trace, and {given}; `mfu` needs the global batch"
        if batch % rows:
            yield f"batch_size {batch:g} is not a multiple of {rows} data-parallel ranks, so it is not the global batch"
        return
    tokens = seen * rows * _degree(card, "cp")
    if abs(tokens - batch * length) > TOLERANCE * tokens:
        times = tokens / (batch * length)
        local = f", which is 1/{times:g} of them: the batch of one rank or one micro-batch" if times > 1 else ""
        yield (
            f"batch_size {batch:g} x seq_len {length:g} are {batch * length:,.0f} tokens per step, but the trace shows "
            f"{tokens:,} over all ranks{local}; `mfu` and throughput are wrong by a factor of {times:.3g}"
        )


def _utilization(card: Card, traces: Sequence[RankSummary]) -> Iterator[str]:
    reached = model_flops_utilization(card, average_step_time(traces))
    if reached is not None and reached > 1:
        yield f"by this card the devices reach {reached:.0%} of their peak: batch, model, count or device is wrong"


def _profiled(traces: Sequence[RankSummary]) -> Iterator[str]:
    if not traces:
        yield "there is no trace of a rank next to the card, so the card could not be checked"
        return
    fewest = min(len(trace.steps) for trace in traces)
    if fewest == 0:
        yield "a trace has no ProfilerStep marks: its steps cannot be counted"
    elif fewest < MIN_STEPS:
        counted = len(without_ends([0] * fewest))
        yield f"{fewest} profiled steps, of which `avg_step_time` counts {counted}: its rule requires 5 steady ones"
    if len({tuple(trace.steps) for trace in traces}) > 1:
        yield "the traces of the ranks are of different steps"


def _bandwidth(card: Card) -> Iterator[str]:
    given = field_value(card, "workload.hardware.network_topo.bandwidth_gbps")
    if not isinstance(given, list):
        return
    numbers = [float(figure) for figure in given[:2] if _is_number(figure)]
    if len(given) != 2:
        yield f"bandwidth_gbps has {len(given)} figures, not two: scale-out, then scale-up"
    elif len(numbers) == 2 and numbers[0] > numbers[1]:
        yield f"bandwidth_gbps is {numbers}: scale-out comes first and is rarely above scale-up; the two may be swapped"


def _backend(card: Card) -> Iterator[str]:
    name = str(field_value(card, f"{LIBRARY}.name") or "")
    if "gloo" in name.lower():
        yield (
            "the library is Gloo, which runs on the host and launches no kernels: figures that find kernels by name "
            "(communication_fraction, total_communication_time, bandwidths) show 0 or nothing, which is wrong"
        )
    elif "nvshmem" in name.lower() or "mscclpp" in name.lower().replace("+", "p"):
        yield f"the library is {shortened(name)} by the card: no field shows which one carried the bytes"


def _degrees(card: Card) -> Iterator[str]:
    total = field_value(card, "workload.hardware.xpu_spec.total_count")
    names = ("dp_replicate", "dp_shard", "tp", "pp", "cp")
    if isinstance(total, int) and any(field_value(card, f"{PLAN}.{name}") is not None for name in names):
        product = math.prod(_degree(card, name) for name in names)
        if product != total:
            yield f"the product of {', '.join(names)} is {product}, but total_count is {total}"


def _degree(card: Card, name: str) -> int:
    given = field_value(card, f"{PLAN}.{name}")
    return int(given) if isinstance(given, int) and 0 < given <= limits.RANKS else 1


def _number(card: Card, path: str) -> float | None:
    given = field_value(card, path)
    return float(given) if _is_number(given) else None


def _is_number(given: Any) -> bool:
    """A number for arithmetic: not a boolean, not NaN or infinite, and below 1e30."""
    return type(given) in (int, float) and -1e30 < given < 1e30


def _is_inference(card: Card) -> bool:
    return field_value(card, "workload.model.phase") in ("inference", "serving")
