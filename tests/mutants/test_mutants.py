"""The list of mutants fits the code, and a sample of them dies on every commit (`make mutants` tries all)."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("mutants_run", Path(__file__).with_name("run.py"))
assert SPEC is not None
assert SPEC.loader is not None
run = importlib.util.module_from_spec(SPEC)
sys.modules["mutants_run"] = run
SPEC.loader.exec_module(run)
MUTANTS = run.read_mutants()


def test_there_are_enough_and_each_has_a_name_of_its_own():
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert sum(bool(mutant.survives) for mutant in MUTANTS) <= 0.05 * len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code(mutant, root):
    text = (root / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, "the code has changed: write the mutant anew"
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.new != mutant.old
    assert bool(mutant.tests) != bool(mutant.survives)
    for test in mutant.tests:
        assert (root / test.split("::")[0]).exists(), test


@pytest.mark.more
def test_ten_of_them_die(root):
    """Others with each commit: all have been tried after a while."""
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    chosen = random.Random(commit.stdout).sample([mutant for mutant in MUTANTS if mutant.tests], 10)
    outcomes = run.try_all(chosen, jobs=2)
    assert not [(outcome.mutant.name, outcome.how) for outcome in outcomes if not outcome.dead]
