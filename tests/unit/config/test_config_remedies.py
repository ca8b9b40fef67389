"""What a refusal tells to do, and what an estimate advises, works: it is done, and the problem is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_config_refusals import WRONG, Wrong

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.keys import KEYS
from quadriga.errors import Problem, UserError
from quadriga.hardware import device_named
from quadriga.models.registry import catalogue
from quadriga.planning.advice import advice_for
from quadriga.planning.estimate import estimate
from quadriga.planning.variants import format_argument

VALUE = r'("[^"]*"|-?[\w.]+)'
SET = re.compile(rf"(?:set |to |or |and |, )?([a-z_]+(?:\.[a-z0-9_]+)+)(?: = | to ){VALUE}")
DIVISOR = re.compile(r"set ([\w.]+) to a (?:divisor|multiple) of \d+(?:, such as (\d+)(?: or (\d+))?)?")
MORE = re.compile(r"raise ([a-z_.0-9]+) to (\d+) or more")


def suggested_changes(fix: str) -> list[list[str]]:
    """Each way out in a `to do`, as arguments of a command line; [] where it names none with a value."""
    if found := DIVISOR.search(fix):
        return [[f"--{found[1]}={value}"] for value in found.groups()[1:] if value]
    if found := MORE.search(fix):
        return [[f"--{found[1]}={found[2]}"]]
    first, *others = re.split(r"; or |, or ", fix)
    ways = []
    for way in (first, *others):
        given = [(key, value.strip('".')) for key, value in SET.findall(way) if key in KEYS and value != "a"]
        if given:
            ways.append([f"--{key}={value}" for key, value in given])
    return ways


def problems_of(argv: list[str], ranks: int) -> tuple[Problem, ...]:
    try:
        read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=True)
    except UserError as error:
        return error.problems
    return ()


def followed(wrong: Wrong) -> int:
    """How many ways out were tried. One may lead to the next problem, whose way out is followed in its turn."""
    Path("run.toml").write_text(wrong.toml, encoding="utf-8")
    argv, tried = ["--job.config_file", "run.toml"], 0
    before = problems_of(argv, wrong.ranks)
    assert before
    for problem in before:
        for way in suggested_changes(problem.fix or ""):
            tried += 1
            given = [*argv, *way]
            after = problems_of(given, wrong.ranks)
            assert problem.what not in {each.what for each in after}, f"{wrong.name}: {way} changed nothing: {problem}"
            for _ in range(4):
                ways = [each for left in after for each in suggested_changes(left.fix or "")]
                if not ways:
                    break
                given += ways[0]
                after = problems_of(given, wrong.ranks)
            left = [each for each in after if each.what not in {other.what for other in before}]
            assert not [each for each in left if suggested_changes(each.fix or "")], (
                f"{wrong.name}: {given} leads to {left}"
            )
    return tried


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_way_out_is_accepted(wrong: Wrong) -> None:
    followed(wrong)


def test_ways_out_are_followed_at_all() -> None:
    assert sum(followed(wrong) for wrong in WRONG) >= 15
    assert suggested_changes('set compile.enable = true, with "model" in compile.components') == [
        ["--compile.enable=true"]
    ]
    assert suggested_changes("set training.local_batch_size to 4, or training.global_batch_size to 32") == [
        ["--training.local_batch_size=4"],
        ["--training.global_batch_size=32"],
    ]


BATCHES = [(local, rows, ranks) for local in (1, 3, 8, 12) for rows in (1, 4, 7, 12, 16, 30) for ranks in (1, 2, 3, 4)]


@pytest.mark.parametrize(("local", "rows", "ranks"), BATCHES)
def test_every_way_out_of_a_batch_that_does_not_divide(local: int, rows: int, ranks: int) -> None:
    argv = [f"--training.local_batch_size={local}", f"--training.global_batch_size={rows}"]
    for problem in problems_of(argv, ranks):
        ways = suggested_changes(problem.fix or "")
        assert ways, problem
        for way in ways:
            assert problems_of([*argv, *way], ranks) == (), (way, problem)


@pytest.mark.parametrize("rows", [-1, 8, 12, 14, 15, 16, 64, 1_000_000_000])
@pytest.mark.parametrize(
    ("schedule", "pp", "size"), [("1F1B", 4, 1), ("1F1B", 3, 1), ("1F1B", 2, 3), ("DualPipeV", 2, 2)]
)
def test_every_way_out_of_too_few_micro_batches(schedule: str, pp: int, size: int, rows: int) -> None:
    given = {"degree": pp, "microbatch_size": size, "schedule": schedule}
    argv = [f"--parallelism.pipeline_parallel_{name}={value}" for name, value in given.items()]
    argv += [f"--training.local_batch_size={size}", f"--training.global_batch_size={rows}", "--model.n_layers=12"]
    few = [problem for problem in problems_of(argv, 2 * pp) if "micro-batches, and there are" in problem.what]
    assert few
    (way,) = suggested_changes(few[0].fix or "")
    assert problems_of([*argv, *way], 2 * pp) == (), way


LAYOUTS = [
    ("8B", 8, ()),
    ("8B", 8, ("--training.local_batch_size=16", "--training.seq_len=8192")),
    ("8B", 16, ("--parallelism.data_parallel_replicate_degree=2", "--training.seq_len=8192")),
    ("8B", 4, ("--parallelism.tensor_parallel_degree=2", "--activation_checkpoint.mode=full")),
    ("70B", 64, ("--training.seq_len=8192",)),
    ("70B", 64, ("--parallelism.tensor_parallel_degree=8", "--activation_checkpoint.mode=none")),
    ("70B", 64, ("--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=8")),
    ("3B", 1, ("--training.local_batch_size=1", "--training.dtype=bfloat16")),
    ("1B", 2, ("--training.mixed_precision_param=float32", "--compile.enable")),
    ("405B", 512, ("--parallelism.tensor_parallel_degree=8", "--activation_checkpoint.mode=full")),
    ("8B", 8, ("--parallelism.context_parallel_degree=2", "--training.seq_len=32768", "--optimizer.beta2=0.999")),
]


@pytest.mark.parametrize(("flavor", "ranks", "keys"), LAYOUTS)
@pytest.mark.parametrize("device", ["H100", "A10G"])
def test_advice_is_accepted_and_saves_what_it_says(flavor: str, ranks: int, keys: tuple[str, ...], device: str) -> None:
    argv = [f"--model.flavor={flavor}", "--model.hf_assets_path=nowhere", *keys]
    known = {"catalogue": catalogue(), "backends": BACKENDS, "world_size": ranks, "training": False}
    given = estimate(read(argv, {}, **known), device_named(device, "device"))
    for piece in advice_for(given):
        ways = [f"--{key}={format_argument(value)}" for key, value in piece.keys]
        try:
            tried = estimate(read([*argv, *ways], {}, **known), given.device)
        except UserError as error:
            raise AssertionError(f"{piece} is refused: {error}") from error
        needed = tried.worst.reserved + tried.outside_allocator
        assert needed == pytest.approx(piece.needed, rel=1e-6), piece
        verdict = tried.memory_fit()
        assert verdict is not None
        assert verdict.fits == piece.fits
