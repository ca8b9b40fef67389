"""The measured figures of README and docs, each computed from a result file.

    python benchmarks/claims.py             # exit code 1 if a figure in a page differs from its result
    python benchmarks/claims.py --write     # writes the figures of the results into the pages

In a page, a figure is between `<!--figure NAME-->` and `<!--/figure-->`, and a table between `<!--table NAME-->` and
`<!--/table-->`. NAME is a key of `FIGURES` or `TABLES`. `tests/docs/test_claims.py` compares the pages with the
results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FIGURE = re.compile(r"<!--figure ([^>]*?)-->(.*?)<!--/figure-->")
TABLE = re.compile(r"(<!--table ([^>]*?)-->\n)(.*?)(<!--/table-->)", re.DOTALL)


@cache
def result_figures(name: str) -> Any:
    """The figures of results/`name`.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]


# --- equivalence -----------------------------------------------------------------------------------------------------


def equivalence_layouts() -> list[dict[str, Any]]:
    return result_figures("equivalence")


def layouts_of_dtype(bfloat16: bool) -> list[dict[str, Any]]:
    return [row for row in equivalence_layouts() if (row["section"] == "bfloat16") == bfloat16]


def max_equivalence_difference(key: str, bfloat16: bool) -> str:
    return f"{max(row[key] for row in layouts_of_dtype(bfloat16)):.1e}"


def round_up(value: float) -> str:
    """The value with one digit, rounded up."""
    exponent = int(f"{value:e}".split("e")[1])
    digit = -(-value // 10.0**exponent)
    return f"{digit:.0f}e{exponent}"


def equivalence_table() -> Iterator[str]:
    yield "| layout | ranks | loss | gradient norm | weights |"
    yield "|---|---|---|---|---|"
    section = None
    for row in equivalence_layouts():
        if row["section"] != section:
            section = row["section"]
            yield f"| **{section}** | | | | |"
        numbers = (f"{row[key]:.0e}" for key in ("loss", "grad_norm", "weights"))
        yield f"| {row['layout']} | {row['ranks']} | {' | '.join(numbers)} |"


def equality_float32() -> list[dict[str, Any]]:
    return [one for one in result_figures("equality_float32")["layouts"] if one["ranks"] > 1]


# --- fidelity --------------------------------------------------------------------------------------------------------

INITIAL_WEIGHTS = "initial weights"  # the only comparison of fidelity without training


def fidelity_runs(bfloat16: bool) -> dict[str, dict[str, Any]]:
    found = {name: one for name, one in result_figures("fidelity")["compared"].items() if name != INITIAL_WEIGHTS}
    return {name: one for name, one in found.items() if (one["targets"]["loss"] > 1e-5) == bfloat16}


def max_fidelity_difference(key: str, bfloat16: bool = False) -> str:
    """The largest difference of the files that meet their targets."""
    return f"{max(one[key] for one in fidelity_runs(bfloat16).values() if one['met']):.1e}"


def files_met() -> str:
    found = [one["met"] for bfloat16 in (False, True) for one in fidelity_runs(bfloat16).values()]
    return f"{sum(found)} of {len(found)}"


def files_missed() -> str:
    found = [name for bfloat16 in (False, True) for name, one in fidelity_runs(bfloat16).items() if not one["met"]]
    return "; ".join(found) or "none"


ADAM, UNCLIPPED = "Adam, weight decay in the gradient", "Adam, nothing clipped"


def fidelity_table() -> Iterator[str]:
    yield "| file | learning rates | loss | gradient norm | validation loss |"
    yield "|---|---|---|---|---|"
    for bfloat16 in (False, True):
        for name, one in fidelity_runs(bfloat16).items():
            rates = f"{len(one['unequal_rates'])} unequal" if one["unequal_rates"] else "equal"
            held_out = f"{one['validation_loss']:.0e}" if "validation_loss" in one else ""
            yield f"| {name} | {rates} | {one['loss']:.0e} | {one['grad_norm']:.0e} | {held_out} |"


def first_step(key: str, side: str) -> str:
    """The minimum and the maximum over the seeds."""
    values = result_figures("fidelity")["compared"][INITIAL_WEIGHTS]["first_step"][key][side]
    return f"{min(values):.2f} to {max(values):.2f}"


# --- estimates -------------------------------------------------------------------------------------------------------


def active_table() -> Iterator[str]:
    yield "| debug model, layout and recompute | measured, MiB | predicted, MiB | error |"
    yield "|---|---|---|---|"
    for name, one in result_figures("estimates")["active"].items():
        error = one["predicted"] / one["measured"] - 1
        yield f"| {name} | {one['measured'] / 2**20:.2f} | {one['predicted'] / 2**20:.2f} | {error:+.2%} |"


def reserved_errors() -> list[float]:
    return [one["reserved"] / one["published"] - 1 for one in result_figures("estimates")["reserved"].values()]


def reserved_table() -> Iterator[str]:
    yield "| published run | active, GiB | reserved, GiB | published, GiB | error |"
    yield "|---|---|---|---|---|"
    for name, one in result_figures("estimates")["reserved"].items():
        note = " (the factors are fitted to it)" if one["fitted"] else ""
        cells = [name + note, *(f"{one[key]:.1f}" for key in ("active", "reserved", "published"))]
        yield f"| {' | '.join(cells)} | {one['reserved'] / one['published'] - 1:+.1%} |"


def speed_table() -> Iterator[str]:
    yield "| published run | GPU, power limit | side | predicted | published | error | fitted without its page |"
    yield "|---|---|---|---|---|---|---|"
    page = None
    for name, one in result_figures("estimates")["speed"].items():
        if one["page"] != page:
            page = one["page"]
            yield f"| **{page}** | | | | | | |"
        cells = [name, f"{one['device']}, {one['limit']}", one["side"]]
        cells += [f"{one['predicted']:,.0f}", f"{one['published']:,.0f}"]
        yield f"| {' | '.join(cells)} | {one['error']:+.1%} | {one['error_without_its_page']:+.1%} |"


def other_systems_table() -> Iterator[str]:
    yield "| system | published, tokens/s per GPU | published / predicted for Quadriga |"
    yield "|---|---|---|"
    for name, one in result_figures("estimates")["others"].items():
        yield f"| {name} | {one['speed']:,.0f} | {one['ratio']:.2f} |"


def constants_table() -> Iterator[str]:
    yield "| constant | fitted | used |"
    yield "|---|---|---|"
    fitted = result_figures("estimates")["fitted"]
    for name, value in fitted.items():
        if name != "rounded":
            yield f"| `{name}` | {value:.3f} | {fitted['rounded'].get(name, 'not used')} |"


def speed_error(side: str, key: str) -> Callable[[], str]:
    return lambda: f"{result_figures('estimates')['speed_errors'][side][key]:.1%}"


def step_time_table() -> Iterator[str]:
    yield "| | measured, s | predicted, s | error | 95 % of the median |"
    yield "|---|---|---|---|---|"
    for name, one in result_figures("step_time")["cases"].items():
        error, low, high = (100 * one[key] for key in ("error", "error_low", "error_high"))
        yield (
            f"| {name} | {one['measured']:.3f} | {one['predicted']:.3f} | {error:+.1f} % "
            f"| {low:+.1f} to {high:+.1f} % |"
        )


def search_table() -> Iterator[str]:
    yield "| file | GPUs | the first, tokens/s per GPU | the second | why |"
    yield "|---|---|---|---|---|"
    for model, found in result_figures("search")["searches"].items():
        first, second = (f"{one['name']}: {one['tokens_per_second_per_device']:,.0f}" for one in found["best"][:2])
        yield f"| {model} | {found['devices']} | {first} | {second} | {found['why']} |"


def dispatch_releases() -> dict[str, dict[str, dict[str, Any]]]:
    """By release of torch, the rows."""
    return result_figures("cuda_dispatch")


def dispatch_table() -> Iterator[str]:
    """Per row the kernels of all releases, and the errors of the newest one; what another release has is added."""
    releases = dispatch_releases()
    newest = list(releases)[-1]
    yield "| row | ranks | attention | waits | calls per step | calls | bytes | memory, GiB | memory |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, row in releases[newest].items():
        others = {release: rows[name] for release, rows in releases.items() if name in rows}
        kernels = sorted({kernel for one in others.values() for kernel in one["kernels"]})
        waits = sum(sum(one["host_reads"].values()) for one in others.values())
        errors = [
            f"{max((one[f'{key}_error'] for one in others.values()), key=abs):+.1%}"
            for key in ("calls", "bytes", "memory")
        ]
        calls = sum(count for count, _ in row["calls"].values())
        cells = [
            name,
            row["ranks"],
            ", ".join(kernels),
            waits,
            calls,
            *errors[:2],
            f"{row['memory'] / 2**30:.2f}",
            errors[2],
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def dispatch_known() -> str:
    rows = list(dispatch_releases().values())[-1]
    return str(sum(bool(row["known"]) for row in rows.values()))


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_case(name: str, shape: str, ranks: int) -> dict[str, Any]:
    return next(row for row in result_figures(name) if (row["shape"], row["ranks"]) == (shape, ranks))


def speed_ratio_text(name: str, shape: str, ranks: int) -> Callable[[], str]:
    """The median ratio of step times with its interval, and whether it missed the target."""

    def shown() -> str:
        case = speed_case(name, shape, ranks)
        found, missed = case["ratio"], "" if case["met"] else "**missed**: "
        return f"{missed}{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f}, {found['count']} pairs)"

    return shown


# --- data ------------------------------------------------------------------------------------------------------------

NOT_RECORDED = "not recorded yet"


def data_recorded() -> bool:
    return (RESULTS / "data_speed.json").exists()


def data_ratio(way: str) -> str:
    return f"{next(row['ratio'] for row in result_figures('data_speed')['text'] if row['what'] == way):.2f}"


def data_wait(kind: str) -> str:
    return f"{100 * result_figures('data_speed')['wait'][kind]['share']:.2f} %"


def token_file_speed() -> float:
    return result_figures("data_speed")["token_files"]["tokens_per_second"]


def data_figure(read: Callable[[], str], target: str | None = None) -> Callable[[], str]:
    """A figure of `data_speed`, and whether it missed its target, a name of its `met`."""

    def shown() -> str:
        if not data_recorded():
            return NOT_RECORDED
        missed = target is not None and not result_figures("data_speed")["met"][target]
        return f"{'**missed**: ' if missed else ''}{read()}"

    return shown


def data_shards(key: str) -> float:
    return result_figures("data_speed")["shards"][key]


def data_table() -> Iterator[str]:
    yield "| text | tokens/s | ratio to the library | seconds of its start |"
    yield "|---|---|---|---|"
    if not data_recorded():
        yield f"| {NOT_RECORDED} | | | |"
        return
    for row in result_figures("data_speed")["text"]:
        start = f"{row['seconds_of_start']:.1f}" if row["seconds_of_start"] else ""
        yield f"| {row['what']} | {row['tokens_per_second']:,.0f} | {row['ratio']:.2f} | {start} |"


def documents_table() -> Iterator[str]:
    yield "| mean length of documents | less work | speed of attention | 95 % of the median |"
    yield "|---|---|---|---|"
    if not (RESULTS / "document_attention.json").exists():
        yield f"| {NOT_RECORDED} | | | |"
        return
    for row in result_figures("document_attention"):
        ratio, share = row["ratio"], f"1/{round(1 / row['mean_share_of_a_row'])} of a row"
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        yield f"| {share} | {row['less_work']:.1f} x | {ratio['median']:.2f} x | {interval} |"


def startup_answer(position: int, key: str) -> str:
    return f"{result_figures('startup')['answers'][position][key]:.2f} s"


def kill_kinds() -> dict[str, int]:
    return {name: kills for name, (kills, _) in result_figures("kill_matrix")["counts"].items()}


def bench_figures(name: str) -> dict[str, Any]:
    return result_figures(f"bench_debug_{name}")


def bench_part_seconds(name: str, part: str, run: int) -> str:
    rows = [row for row in bench_figures(name)["where"] if row["part"] == part]
    return f"{rows[0]['by_run'][run]['seconds']:.2f}"


def worst_continuation(key: str) -> str:
    """The largest difference of all runs that changed the trainer."""
    return f"{max(run[key] for run in result_figures('continue_torchtitan')['runs'].values()):.1e}"


FIGURES: dict[str, Callable[[], str]] = {
    "dispatch rows": lambda: str(len(list(dispatch_releases().values())[-1])),
    "dispatch known": dispatch_known,
    "dispatch releases": lambda: ", ".join(dispatch_releases()),
    "continued loss": lambda: worst_continuation("loss"),
    "continued norm": lambda: worst_continuation("grad_norm"),
    "continued runs": lambda: str(len(result_figures("continue_torchtitan")["runs"])),
    "float32 layouts": lambda: str(len(layouts_of_dtype(False))),
    "bfloat16 layouts": lambda: str(len(layouts_of_dtype(True))),
    "all layouts": lambda: str(len(equivalence_layouts())),
    "float32 loss": lambda: max_equivalence_difference("loss", False),
    "float32 norm": lambda: max_equivalence_difference("grad_norm", False),
    "float32 weights": lambda: max_equivalence_difference("weights", False),
    "bfloat16 loss": lambda: max_equivalence_difference("loss", True),
    "bfloat16 norm": lambda: max_equivalence_difference("grad_norm", True),
    "bfloat16 weights": lambda: max_equivalence_difference("weights", True),
    "float32 loss within": lambda: round_up(max(row["loss"] for row in layouts_of_dtype(False))),
    "bfloat16 loss within": lambda: round_up(max(row["loss"] for row in layouts_of_dtype(True))),
    "equal steps": lambda: str(min(one["bit_equal_steps"] for one in result_figures("equality")["layouts"])),
    "float32 sum, 20 steps": lambda: (
        f"{max(one['greatest_relative_difference']['20'] for one in equality_float32()):.1e}"
    ),
    "float32 sum, worst": lambda: f"{max(one['greatest_over_all_steps'] for one in equality_float32()):.1e}",
    "float32 sum, worst step": lambda: str(
        max(equality_float32(), key=lambda one: one["greatest_over_all_steps"])["at_step"]
    ),
    "fidelity files": lambda: str(len(fidelity_runs(False)) + len(fidelity_runs(True))),
    "fidelity files met": files_met,
    "fidelity missed": files_missed,
    "fidelity Adam": lambda: f"{result_figures('fidelity')['compared'][ADAM]['loss']:.1e}",
    "fidelity steps": lambda: str(result_figures("fidelity")["steps"]),
    "fidelity loss": lambda: max_fidelity_difference("loss"),
    "fidelity norm": lambda: max_fidelity_difference("grad_norm"),
    "fidelity printed norm": lambda: max_fidelity_difference("printed_grad_norm"),
    "fidelity bfloat16 loss": lambda: max_fidelity_difference("loss", True),
    "fidelity bfloat16 norm": lambda: max_fidelity_difference("grad_norm", True),
    "fidelity Adam unclipped": lambda: f"{result_figures('fidelity_adam')['compared'][UNCLIPPED]['loss']:.1e}",
    "fidelity first loss": lambda: first_step("loss", "ours"),
    "fidelity first loss there": lambda: first_step("loss", "theirs"),
    "fidelity first norm": lambda: first_step("grad_norm", "ours"),
    "fidelity first norm there": lambda: first_step("grad_norm", "theirs"),
    "fidelity deviation": lambda: (
        f"{100 * result_figures('fidelity')['compared'][INITIAL_WEIGHTS]['worst_deviation']:.2f} %"
    ),
    "active median": lambda: f"{result_figures('estimates')['median_error']:.2%}",
    "active worst": lambda: f"{result_figures('estimates')['worst_error']:.2%}",
    "published runs": lambda: str(len(result_figures("estimates")["reserved"])),
    "reserved least": lambda: f"{min(reserved_errors()):+.1%}",
    "reserved most": lambda: f"{max(reserved_errors()):+.1%}",
    "reserved below": lambda: str(sum(error < 0 for error in reserved_errors())),
    "published speeds": lambda: str(len(result_figures("estimates")["speed"])),
    "speed rows held out": lambda: str(result_figures("estimates")["speed_errors"]["held out"]["rows"]),
    **{
        f"speed {side} {key}": speed_error(side, key)
        for side in ("fit", "held out", "without its page")
        for key in ("median", "worst")
    },
    "step time worst": lambda: (
        f"{100 * max(abs(one['error']) for one in result_figures('step_time')['cases'].values()):.1f} %"
    ),
    "attention worst": lambda: f"{100 * max(map(abs, result_figures('attention')['errors'].values())):.0f} %",
    "candidates a second": lambda: f"{result_figures('search')['candidates_a_second']:,.0f}",
    "shakespeare": lambda: f"{result_figures('shakespeare')['nats_per_byte']:.3f}",
    "help median": lambda: startup_answer(0, "median"),
    "dry run median": lambda: startup_answer(1, "median"),
    "first step ratio": lambda: f"{result_figures('startup')['first_step']['ratio']:.2f}",
    "speed debug 1": speed_ratio_text("speed", "debug", 1),
    "speed small 1": speed_ratio_text("speed", "small", 1),
    "speed debug 2": speed_ratio_text("speed", "debug", 2),
    "speed debug 4": speed_ratio_text("speed", "debug", 4),
    "speed small 2": speed_ratio_text("speed", "small", 2),
    "speed debug bfloat16": speed_ratio_text("speed_bfloat16_short", "debug", 1),
    "speed small bfloat16": speed_ratio_text("speed_bfloat16_small_short", "small", 1),
    "speed debug bfloat16 full": speed_ratio_text("speed_bfloat16", "debug", 1),
    "speed small bfloat16 full": speed_ratio_text("speed_bfloat16", "small", 1),
    "kill trials": lambda: str(result_figures("kill_matrix")["trials"]),
    "kills": lambda: str(result_figures("kill_matrix")["kills"]),
    "kills that differ": lambda: str(len(result_figures("kill_matrix")["different"])),
    "mutants": lambda: str(result_figures("mutants")["mutants"]),
    "mutants dead": lambda: str(result_figures("mutants")["dead"]),
    "save cost": lambda: f"{100 * result_figures('save_cost')['inflation']['median']:.1f} %",
    "save cost quartiles": lambda: inflation_quartiles("save_cost"),
    "save size": lambda: f"{result_figures('save_cost')['bytes_a_save'] / 2**30:.2f} GiB",
    "save seconds": lambda: f"{result_figures('save_cost')['seconds_a_save']:.1f} s",
    "save waited": lambda: f"{result_figures('save_cost')['seconds_training_waited']:.2f} s",
    "save step": lambda: f"{result_figures('save_cost')['seconds_a_step_without']:.1f} s",
    "save memory before": lambda: f"{result_figures('save_cost')['memory_gib']['before the first save']:.1f}",
    "save memory most": lambda: f"{result_figures('save_cost')['memory_gib']['at most']:.1f} GiB",
    "save cost 1024": lambda: f"{100 * result_figures('save_cost_1024_tokens')['inflation']['median']:.1f} %",
    "save cost 1024 quartiles": lambda: inflation_quartiles("save_cost_1024_tokens"),
    "save cost 1024 pairs": lambda: str(len(result_figures("save_cost_1024_tokens")["blocks"])),
    "save step 1024": lambda: f"{result_figures('save_cost_1024_tokens')['seconds_a_step_without']:.1f} s",
    "plan seconds": lambda: f"{result_figures('plan_speed')['plan.json']['seconds']:.1f} s",
    "plan memory": lambda: f"{result_figures('plan_speed')['plan.json']['peak_bytes'] / 1e9:.2f} GB",
    "older plan seconds": lambda: f"{result_figures('plan_speed')['.metadata']['seconds']:.1f} s",
    "older plan memory": lambda: f"{result_figures('plan_speed')['.metadata']['peak_bytes'] / 1e9:.2f} GB",
    "trace megabytes": lambda: f"{result_figures('trace_speed')['bytes'] / 1e6:.0f} MB",
    "trace plain": lambda: f"{result_figures('trace_speed')['plain']['seconds']:.0f} s",
    "trace packed": lambda: f"{result_figures('trace_speed')['packed']['seconds']:.0f} s",
    "trace memory": lambda: (
        f"{max(result_figures('trace_speed')[kind]['peak_bytes'] for kind in ('plain', 'packed')) / 1e9:.1f} GB"
    ),
    "bench answer": lambda: bench_figures("unlike")["answer"].split(" (")[0].replace("reduce_gradients=", ""),
    "bench interval": lambda: slower_interval(bench_figures("unlike")["ratio_of_step_times"]["interval"]),
    "bench exposed": lambda: " and ".join(
        bench_part_seconds("unlike", "exposed_communication_s", run) for run in (0, 1)
    ),
    "bench compute": lambda: " and ".join(bench_part_seconds("unlike", "compute_s", run) for run in (0, 1)),
    "bench losses": lambda: f"{bench_figures('unlike')['largest_difference_of_losses']['value']:.1e}",
    "tokenize ratio": data_figure(lambda: data_ratio("tokenize"), "tokenize"),
    "fastokens ratio": data_figure(lambda: data_ratio("tokenize, fastokens")),
    "token file speed": data_figure(
        lambda: f"{result_figures('data_speed')['token_files']['tokens_per_second'] / 1e6:.0f} M tokens/s",
        "token files",
    ),
    "wait of text": data_figure(lambda: data_wait("text"), "wait of text"),
    "wait of token files": data_figure(lambda: data_wait("token files"), "wait of token files"),
    "shards opened": data_figure(lambda: f"{data_shards('opened'):.2f} s", "seconds to open"),
    "far step": data_figure(lambda: f"{data_shards('reached'):.2f} s", "seconds to the step"),
    "shards memory": data_figure(lambda: f"{data_shards('memory') / 1e9:.2f} GB", "bytes of memory"),
    "shards files": data_figure(lambda: f"{data_shards('files'):.0f} files", "files open"),
    "alike interval": lambda: slower_interval(bench_figures("alike")["ratio_of_step_times"]["interval"], of_speed=True),
}
TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "cuda dispatch": dispatch_table,
    "attention of documents": documents_table,
    "search": search_table,
    "equivalence": equivalence_table,
    "fidelity": fidelity_table,
    "active": active_table,
    "reserved": reserved_table,
    "speed": speed_table,
    "other systems": other_systems_table,
    "constants": constants_table,
    "step time": step_time_table,
    "data speed": data_table,
}


def inflation_quartiles(name: str) -> str:
    found = result_figures(name)["inflation"]
    return f"{100 * found['lower quartile']:.1f} to {100 * found['upper quartile']:.1f} %"


def slower_interval(interval: list[float], of_speed: bool = False) -> str:
    """The interval of a ratio of step times, as a change of speed in percent: slower by, or signed with `of_speed`."""
    changes = sorted(100 * (1 / bound - 1) for bound in interval)
    if not of_speed:
        changes = sorted(-change for change in changes)
    return f"{changes[0]:.1f} to {changes[1]:.1f} %"


def outdated_figures(page: str) -> list[str]:
    """The figures and tables of a page that differ from their results, and unknown names."""
    wrong = []
    for name, shown in FIGURE.findall(page):
        expected = FIGURES[name]() if name in FIGURES else "no such figure"
        if shown != expected:
            wrong.append(f"figure {name!r}: the page has {shown!r}, the result {expected!r}")
    for _, name, shown, _ in TABLE.findall(page):
        expected = "\n".join(TABLES[name]()) + "\n" if name in TABLES else "no such table"
        if shown != expected:
            wrong.append(f"table {name!r} is not that of the result")
    return wrong


def with_current_figures(page: str) -> str:
    page = FIGURE.sub(lambda m: f"<!--figure {m[1]}-->{FIGURES[m[1]]()}<!--/figure-->", page)
    return TABLE.sub(lambda m: f"{m[1]}" + "\n".join(TABLES[m[2]]()) + f"\n{m[4]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the figures of the results into the pages")
    given = parser.parse_args()
    wrong = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if given.write:
            path.write_text(with_current_figures(page), encoding="utf-8")
        for difference in [] if given.write else outdated_figures(page):
            print(f"{Path(path).relative_to(ROOT)}: {difference}")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
