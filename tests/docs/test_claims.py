"""Every measured figure of README and docs is that of a result file, and says of what kind it is."""

from __future__ import annotations

import json
import re
import sys

import pytest
from launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import all as all_benchmarks  # found by the line above
import claims
import common
import results_age

# A number with a unit that only a measurement has. Markers and their content are taken out before it is looked for.
MEASURED = re.compile(r"\d(?:[\d.,]*\d)? ?(?:s|ms|%|MiB|GiB|MB|GB)(?![\w-])|\d[\d.]*e-\d+")
RESULT_LINK = re.compile(r"benchmarks/(?:results/)?\w+\.(?:py|json)|results/\w+\.json")
# Lines with a link to a result or a script whose numbers are none of its figures: targets, sizes that are given.
NOT_FIGURES = (
    "| claim | target |",
    "Target: within 10 %",
    "300 MB in under 60 s",
    "python benchmarks/nvshmem",
    "on H100 GPUs of 80 GB",
)


@pytest.mark.parametrize("page", claims.PAGES, ids=lambda path: path.name)
def test_the_figures_of_a_page_are_those_of_the_results(page):
    assert claims.outdated_figures(page.read_text(encoding="utf-8")) == []


def test_every_figure_is_used():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in claims.PAGES)
    assert set(claims.FIGURES) - {"all layouts"} == {name for name, _ in claims.FIGURE.findall(pages)} - {"all layouts"}
    assert set(claims.TABLES) == {name for _, name, _, _ in claims.TABLE.findall(pages)}


def test_a_wrong_figure_is_found():
    page = "x <!--figure kill trials-->7000<!--/figure--> <!--figure nothing-->1<!--/figure-->"
    assert len(claims.outdated_figures(page)) == 2
    assert claims.outdated_figures(claims.with_current_figures("<!--figure kill trials-->7000<!--/figure-->")) == []


def test_the_measured_column_of_the_readme_holds_nothing_but_figures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("| claim | target | measured |")
    table = text[start : text.index("\n\n", start)].splitlines()[2:]
    assert len(table) >= 10
    for row in table:
        measured = row.split("|")[3]
        assert "<!--figure" in measured, row
        assert not re.search(r"\d", claims.FIGURE.sub("", measured)), row


@pytest.mark.parametrize("page", claims.PAGES, ids=lambda path: path.name)
def test_what_names_a_result_states_no_figure_by_hand(page):
    if page.parent.name == "benchmarks":
        return  # targets and durations of the scripts
    text = claims.TABLE.sub("", page.read_text(encoding="utf-8"))
    by_hand = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\|)", text):
        if RESULT_LINK.search(paragraph) and not any(part in paragraph for part in NOT_FIGURES):
            bare = claims.FIGURE.sub("", paragraph)
            cells = bare.split("|")
            bare = "|".join(cells[2:]) if page.name == "checkpoints.md" and len(cells) > 3 else bare
            by_hand += MEASURED.findall(re.sub(r"target \d+ %|95 %|`[^`]*`", "", bare))
    assert not by_hand, by_hand


def test_results_know_their_commit_and_what_they_measure(tmp_path):
    path = common.save("x", {"a": 1}, command=["python", "benchmarks/search.py"], claim="c", folder=tmp_path)
    result = json.loads(path.read_text())
    assert set(result["measures"]) == {
        "quadriga/planning",
        "quadriga/models",
        "quadriga/config",
        "quadriga/hardware.py",
    }
    assert not result["versions"]["commit"].endswith("+")
    assert results_age.changed_since(result) == []
    changed = {**result, "measures": {**result["measures"], "quadriga/models": "0" * 40}}
    assert results_age.changed_since(changed) == ["quadriga/models"]


def test_a_dirty_tree_is_refused(monkeypatch):
    monkeypatch.setattr(common, "git", lambda *arguments: " M quadriga/train/step.py")
    with pytest.raises(SystemExit, match=r"quadriga/train/step\.py"):
        common.save("x", {}, command=["python", "benchmarks/search.py"], claim="c")
    assert not (common.RESULTS / "x.json").exists()


def test_all_runs_all():
    saving = {
        script.stem
        for script in (ROOT / "benchmarks").glob("*.py")
        if re.search(r"\bsave\(", script.read_text(encoding="utf-8")) and script.stem not in ("common", "all")
    }
    assert saving | {"plan_speed"} == set(all_benchmarks.RUNS) | set(all_benchmarks.NOT_RUN_HERE)


def test_every_script_that_saves_says_what_it_measures():
    for script in (ROOT / "benchmarks").glob("*.py"):
        if re.search(r"\bsave\(", script.read_text(encoding="utf-8")) and script.stem not in ("common", "modes"):
            known = script.stem in common.MEASURES or script.stem == "nvshmem_one_gpu"
            assert known, f"{script.name}: add its folders to common.MEASURES"
    for folders in common.MEASURES.values():
        assert all((ROOT / "quadriga" / folder).exists() for folder in folders), folders
