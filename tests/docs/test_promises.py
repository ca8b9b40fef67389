"""docs/promises.md: each promise names the page that makes it, the tests that hold it, and what runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from promises import PAGE, ROOT, Promise, commands_of, faults, headings, rows

PROMISES = list(rows(PAGE.read_text(encoding="utf-8")))

# Sections of README without a promise of their own.
NO_PROMISE = {
    "five-main-features": "its subsections have rows",
}
# Pages without a promise to users.
NO_ROWS = {
    "promises.md": "this page",
    "glossary.md": "it explains words",
}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.text)
def test_a_promise_is_held(promise: Promise) -> None:
    assert list(faults(promise)) == []


def test_no_promise_is_there_twice() -> None:
    assert len({promise.text for promise in PROMISES}) == len(PROMISES) >= 100


def test_every_section_of_readme_has_a_promise() -> None:
    named = {anchor.partition("#")[2] for promise in PROMISES for anchor in promise.anchors if "README" in anchor}
    assert set(headings(ROOT / "README.md", deepest=3)) - {"quadriga"} - named == NO_PROMISE.keys()


def test_every_page_has_a_promise() -> None:
    named = {page.name for promise in PROMISES for page in promise.stated}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {"README.md", "SECURITY.md"}
    assert pages - named == NO_ROWS.keys(), "docs/promises.md needs rows for what these pages promise"


HERE = "tests/docs/test_promises.py"
ROW = f"| a | [x](../README.md#run-it) | `{HERE}::test_a_promise_is_held` | `make test` |"
SOUND = next(rows("|||||\n|||||\n" + ROW))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            replace(SOUND, tests=((HERE, "test_of_nothing"),)),
            "there is no tests/docs/test_promises.py::test_of_nothing",
        ),
        (replace(SOUND, tests=((HERE, "faults"),)), "there is no tests/docs/test_promises.py::faults"),
        (replace(SOUND, tests=(("tests/test_nothing.py", "test_x"),)), "there is no tests/test_nothing.py::test_x"),
        (replace(SOUND, anchors=("README.md#nowhere",)), "README.md has no heading #nowhere"),
        (replace(SOUND, anchors=("docs/nothing.md#x",)), "there is no docs/nothing.md"),
        (replace(SOUND, results=("../benchmarks/results/x.json",)), "there is no ../benchmarks/results/x.json"),
        (replace(SOUND, run_by=frozenset({"make test-all"})), "is run by make test, and not by make test-all"),
        (
            replace(SOUND, results=("../benchmarks/results/hta.json",)),
            "is run by benchmarks/hta.py, make test, and not",
        ),
        (replace(SOUND, tests=()), "no page or no test is named"),
    ],
)
def test_a_wrong_row_is_found(wrong: Promise, says: str) -> None:
    assert list(faults(SOUND)) == []
    assert any(fault.startswith(says) for fault in faults(wrong))


def test_markers_are_read_on_the_test_and_among_its_cases() -> None:
    assert commands_of("tests/fuzz/test_fuzz.py", "test_3000_cases") == {"make test-all"}
    assert commands_of("tests/fuzz/test_fuzz.py", "test_300_cases") == {"make test-more"}
    dispatch, adam = (f"tests/cuda_dispatch/{name}.py" for name in ("test_dispatch", "test_fused_adam"))
    for file, name in ((dispatch, "test_a_row"), (adam, "test_a_step_on_cuda_reads_nothing_on_the_host")):
        assert commands_of(file, name) == {"make test-cuda-dispatch"}, "a marker of the module, alone and in a list"
    both = {"make test", "make test-all"}
    assert commands_of("tests/distributed/test_launch.py", "test_the_first_error_of_a_failed_rank_comes_last") == both
    assert (
        commands_of("tests/distributed/test_start_watch.py", "test_one_rank_that_hangs_is_ended_with_phase_and_stack")
        == both
    )
